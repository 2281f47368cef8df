"""The default: another method for every kind of media. Ours."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from tokencomp.reducers.condiv import ConDiv
from tokencomp.reducers.kcentre import KCentre
from tokencomp.reducers.registry import register_reducer
from tokencomp.reducers.score import ChoosingReducer
from tokencomp.reducers.uniform import Uniform
from tokencomp.tokens.patches import Patches
from tokencomp.tokens.signals import Attention


@register_reducer("auto")
@dataclass(frozen=True, repr=False)
class Auto(ChoosingReducer):
    """`kcentre` on images, `condiv` on videos, and `uniform` on audio.

    On images attention has no part, because that of early layers leans towards the end of a picture
    (arXiv 2412.13180), so prompts without videos are not scored. On videos it has: what happens
    again looks like what is already kept, and relevance has to speak for it. In sound, tokens that
    look alike say how long and how often, and choosing by distance loses that. As the default of
    `patch` it also merges in images, `rest="auto"`. Chosen on validation questions:
    docs/decisions/0001-default-reducer.md.
    """

    by_kind: ClassVar[dict[str, KCentre | ConDiv | Uniform]] = {
        "image": KCentre(),
        "video": ConDiv(),
        "audio": Uniform(),
    }
    needs = frozenset({Attention("text", kinds=frozenset({"video"}))})
    summary = "the default: kcentre on images, condiv on videos, uniform on audio"

    def __repr__(self) -> str:
        return f"Auto({', '.join(f'{name}={value!r}' for name, value in self.by_kind.items())})"

    def chosen(self, patches: Patches) -> Tensor:
        kinds = dict.fromkeys(patches.batch.kinds)
        parts = [self.by_kind[kind].chosen(of_kind(patches, kind)) for kind in kinds]
        return parts[0] if len(parts) == 1 else torch.cat(parts).sort().values


def of_kind(patches: Patches, kind: str) -> Patches:
    """The same patches with a budget of 0 for the spans of other kinds."""
    pairs = zip(patches.budgets, patches.batch.kinds, strict=True)
    return replace(patches, budgets=[n if own == kind else 0 for n, own in pairs])
