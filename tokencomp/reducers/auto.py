"""The default: another method for every modality. Ours."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from tokencomp.plan.reducer import Traits
from tokencomp.reducers.base import Reducer
from tokencomp.reducers.condiv import ConDiv
from tokencomp.reducers.kcenter import KCenter
from tokencomp.reducers.registry import register_reducer
from tokencomp.reducers.uniform import Uniform
from tokencomp.tokens.kept import Kept
from tokencomp.tokens.signals import Attention
from tokencomp.tokens.tokens import Tokens


@register_reducer("auto")
@dataclass(frozen=True, repr=False)
class Auto(Reducer):
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
    traits = Traits(batched=True)
    summary = "the default: kcenter on images, condiv on videos, uniform on audio"

    def __repr__(self) -> str:
        return f"Auto({', '.join(f'{name}={value!r}' for name, value in self.by_modality.items())})"

    def reduce(self, tokens: Tokens) -> Kept:
        modalities = dict.fromkeys(tokens.modalities)
        parts = [
            self.by_modality[modality].reduce(of_modality(tokens, modality)).rows
            for modality in modalities
        ]
        return Kept(parts[0] if len(parts) == 1 else torch.cat(parts).sort().values)


def of_modality(tokens: Tokens, modality: str) -> Tokens:
    """The same patches with a budget of 0 for the spans of other modalities."""
    pairs = zip(tokens.budgets, tokens.modalities, strict=True)
    return replace(tokens, budgets=[n if own == modality else 0 for n, own in pairs])
