"""The default: one method for what is seen, another for what is heard (ours)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from tokencomp.reducers import Kept, Reducer, Tokens, Traits, register_reducer
from tokencomp.reducers.kcenter import KCenter
from tokencomp.reducers.uniform import Uniform
from tokencomp.tokens.tokens import Grid

IMAGES, VIDEOS, AUDIO = KCenter(), KCenter(step_weight=4.0), Uniform()
STEPS_FROM = 12
"""Of a video that keeps a smaller share than one in so many tokens, events that repeat would take
the budget of everything else."""


@register_reducer("auto")
@dataclass(frozen=True, repr=False)
class Auto(Reducer):
    """`kcenter` on images and videos, and `uniform` on audio.

    - Images and videos: early layers attend more to the end of an image (arXiv 2412.13180), and a
      long answer needs what its question does not name, so attention is not used.
    - Videos that keep a twelfth or more: cells that change from step to step are told apart
      (`step_weight=4`), so that events that repeat can be counted.
    - Audio: tokens that look alike carry duration and count, which choosing by distance would lose.

    As the default of `patch` it also merges in videos and images, `merge="auto"`. It was chosen on
    validation questions: docs/decisions/0001-default-reducer.md.
    """

    traits = Traits(batched=True)
    summary = "the default: kcenter on images and videos, uniform on audio"

    def __repr__(self) -> str:
        return f"Auto(image={IMAGES!r}, video={VIDEOS!r} from 1/{STEPS_FROM}, audio={AUDIO!r})"

    def reduce(self, tokens: Tokens) -> Kept:
        spans = zip(tokens.modalities, tokens.budgets, tokens.grids, strict=True)
        chosen = [_reducer(modality, budget, grid) for modality, budget, grid in spans]
        reducers = list(dict.fromkeys(chosen))
        if len(reducers) == 1:
            return reducers[0].reduce(tokens)
        rows = []
        for reducer in reducers:
            # Spans of the other reducers have the budget 0.
            pairs = zip(tokens.budgets, chosen, strict=True)
            budgets = [n if one == reducer else 0 for n, one in pairs]
            rows.append(reducer.reduce(replace(tokens, budgets=budgets)).patches)
        return Kept(torch.cat(rows).sort().values)


def _reducer(modality: str, budget: int, grid: Grid) -> KCenter | Uniform:
    """What chooses in a span of this grid."""
    if modality == "audio":
        return AUDIO
    return VIDEOS if modality == "video" and STEPS_FROM * budget >= math.prod(grid) else IMAGES
