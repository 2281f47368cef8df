"""Decoders with linear, sliding and full layers: prefill, decoding, beams and later turns."""

from __future__ import annotations

import pytest
import torch
from support import kinds, oracle
from support.families import Family, text
from support.family.hybrid import HYBRID

import sys; sys.path.insert(0,'/tmp'); import masks_adapters
import tokencomp

FAMILY_NAMES = sorted(HYBRID)
ENTRY = tokencomp.Plan((tokencomp.Stage(0, 0.4, tokencomp.make_reducer("uniform")),))


def ragged(family: Family) -> dict[str, torch.Tensor]:
    """A left-padded batch of two images, one image, and text alone."""
    torch.manual_seed(7)
    return family.batch(
        [
            [text(3), family.image(0), text(2, 2), family.image(1), text(5, 3)],
            [text(4, 4), family.image(1), text(4, 5)],
            [text(9, 6)],
        ]
    )


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_prefill_and_decode(family: Family, backend: str) -> None:
    model, inputs = family.build(backend), ragged(family)
    width = inputs["input_ids"].shape[1]
    steps = 12  # more than a window, so that what has left comes out of it
    with torch.no_grad():
        plain = model(**inputs).logits[:2, -1]
    with tokencomp.patch(model, plan=ENTRY) as handle:
        out = oracle.generate(model, inputs, steps)
        masks = oracle.kept_columns(handle, inputs, family.layers)
    logits = torch.stack(out.logits, 1)
    expected = kinds.expected_logits(model, family, inputs, masks, out.sequences[:, width:-1])
    assert difference(logits, expected[:, width - 1 :]) < 5e-5
    assert difference(logits[:2, 0], plain) > 1e-2  # compression has an effect
