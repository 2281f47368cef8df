"""Tiny models see images: a test of selection or merging on equal patches could not fail."""

from __future__ import annotations

import torch
from support.families import FAMILIES, Family, text
from support.family.hybrid import HYBRID
from support.family.structural import STRUCTURAL

import tokencomp

FAMILY_NAMES = [*FAMILIES, *HYBRID, *STRUCTURAL]


def test_patches_and_images_differ(family: Family) -> None:
    """No two patches have one direction, and the default keeps others of another image."""
    model, seen = family.build(), []
    inputs = family.batch([[text(3), family.image(0), text(4)] for _ in range(3)])

    def note(module: torch.nn.Module, args: object, kwargs: dict[str, torch.Tensor]) -> None:
        seen.append(kwargs["inputs_embeds"])

    family.decoder(model).register_forward_pre_hook(note, with_kwargs=True)
    with torch.no_grad():
        model(**inputs)
        with tokencomp.patch(model, 0.5) as handle:
            model(**inputs)
    kept = [handle.stats.kept(b)[0] for b in range(3)]
    assert kept[0] != kept[1] != kept[2] != kept[0]
    for span in handle.stats.spans[0]:
        offsets = sorted({*range(span.length)} - {*span.special, *span.text})
        patches = torch.nn.functional.normalize(seen[0][0, span.start : span.stop][offsets], dim=1)
        cosines = patches @ patches.T - torch.eye(len(patches))
        assert cosines.max() < 0.999
