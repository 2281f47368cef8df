"""Comparator: attention of two depths of the vision tower."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tokencomp.reducers._rows import finite_values, keep_patches, patch_rows, tower_signal
from tokencomp.reducers.base import Reducer
from tokencomp.reducers.registry import register_reducer
from tokencomp.tokens.reduction import Reduction
from tokencomp.tokens.signals import TOWER_ATTENTION, TowerSignal
from tokencomp.tokens.spans import VisualTokens

ANCHORS = 0.1 / 5  # share of the budget, before their neighbours
MIDDLE = TowerSignal("attention", 0.5)


@register_reducer("hiprune")
@dataclass(frozen=True)
class HiPrune(Reducer):
    """Anchors of a middle block with their neighbours, then what the last block attends to.

    HiPrune (arXiv 2508.00553). round(0.02 · K) anchors are the tokens with the largest attention in
    the block in the middle of the vision tower, where it follows objects; each brings its
    neighbours, the cells before and behind it and those above and below. The others of the budget
    are those with the largest attention in the last block in use.

    Notes
    -----
    Exactly K tokens stay. On Qwen the release marks chosen tokens by subtracting 1 from an
    attention that may exceed 1, so that it chooses some twice and keeps fewer than K. The middle is
    the block at half of the depth, as in the release for Qwen2.5-VL (16 of 32); for LLaVA it takes
    block 9 of 24. Towers with a class token are read by its attention, in the release by that of
    all rows. Neighbours at the edge wrap into the next row, as in the release.
    """

    summary = "attention of a middle and the last block of the tower (HiPrune 2508.00553)"
    grid = "known"
    needs = frozenset({MIDDLE, TOWER_ATTENTION})

    def reduce(self, tokens: VisualTokens, keep: int) -> Reduction:
        from tokencomp.kernels import topk_stable

        rows, budget = patch_rows(tokens, keep)
        both = torch.stack(
            [tower_signal(tokens, s, "hiprune")[rows] for s in (MIDDLE, TOWER_ATTENTION)]
        )
        middle, last = finite_values(both, "attentions of the vision tower")
        t, h, w = tokens.grid
        cells = tokens.cells()
        anchors = cells[topk_stable(middle, round(budget * ANCHORS))]
        steps = anchors.new_tensor([0, -1, 1, -w, w])
        near = (anchors[:, None] + steps).flatten().clamp(0, t * h * w - 1)
        chosen = torch.isin(cells, near)
        # Tokens that stay anyway stand before all others.
        kept = topk_stable(last.masked_fill(chosen, torch.inf), budget)
        return keep_patches(tokens, rows[kept])
