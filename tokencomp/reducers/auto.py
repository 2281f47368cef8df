"""The default: another method for every modality. Ours."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from tokencomp.reducers.condiv import ConDiv
from tokencomp.reducers.kcenter import KCenter
from tokencomp.reducers.registry import register_reducer
from tokencomp.reducers.score import ChoosingReducer
from tokencomp.reducers.uniform import Uniform
from tokencomp.tokens.patches import Patches
from tokencomp.tokens.signals import Attention


@register_reducer("auto")
@dataclass(frozen=True, repr=False)
class Auto(ChoosingReducer):
    """`kcenter` on images, `condiv` on videos, and `uniform` on audio.

    On images attention has no part, because that of early layers leans towards the end of a picture
    (arXiv 2412.13180), so prompts without videos are not scored. On videos it has: what happens
    again looks like what is already kept, and relevance has to speak for it. In sound, tokens that
    look alike say how long and how often, and choosing by distance loses that. As the default of
    `patch` it also merges in images, `merge="auto"`. Chosen on validation questions:
    docs/decisions/0001-default-reducer.md.
    """

    by_modality: ClassVar[dict[str, KCenter | ConDiv | Uniform]] = {
        "image": KCenter(),
        "video": ConDiv(),
        "audio": Uniform(),
    }
    needs = frozenset({Attention("text", modalities=frozenset({"video"}))})
    summary = "the default: kcenter on images, condiv on videos, uniform on audio"

    def __repr__(self) -> str:
        return f"Auto({', '.join(f'{name}={value!r}' for name, value in self.by_modality.items())})"

    def chosen(self, patches: Patches) -> Tensor:
        modalities = dict.fromkeys(patches.batch.modalities)
        parts = [
            self.by_modality[modality].chosen(of_modality(patches, modality))
            for modality in modalities
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts).sort().values


def of_modality(patches: Patches, modality: str) -> Patches:
    """The same patches with a budget of 0 for the spans of other modalities."""
    pairs = zip(patches.budgets, patches.batch.modalities, strict=True)
    return replace(patches, budgets=[n if own == modality else 0 for n, own in pairs])
