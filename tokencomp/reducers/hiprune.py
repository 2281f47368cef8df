"""Comparator: attention of two depths of the vision tower."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from tokencomp.plan.reducer import Traits
from tokencomp.reducers._batch import best_rows, finite_values, tower_signal
from tokencomp.reducers.published import Published
from tokencomp.reducers.registry import register_reducer
from tokencomp.tokens.kept import Kept
from tokencomp.tokens.signals import TOWER_ATTENTION, TowerSignal
from tokencomp.tokens.tokens import Tokens

ANCHORS = 0.1 / 5  # share of the budget, before their neighbours
MIDDLE = TowerSignal("attention", 15 / 32)


@register_reducer("hiprune")
@dataclass(frozen=True)
class HiPrune(Published):
    """Anchors of a middle block with their neighbours, then what the last block attends to.

    HiPrune (arXiv 2508.00553). round(0.02 · K) anchors are the tokens with the largest attention in
    the block in the middle of the vision tower, where it follows objects; each brings its
    neighbours, the cells before and behind it and those above and below. The others of the budget
    are those with the largest attention in the last block in use.

    Notes
    -----
    Exactly K tokens stay. On Qwen the release marks chosen tokens by subtracting 1 from an
    attention that may exceed 1, so that it chooses some twice and keeps fewer than K. The middle is
    the sixteenth of 32 blocks, as in the release for Qwen2.5-VL, and block ⌊15/32 · n⌋, counted
    from 0, of n others; for LLaVA the release takes the ninth of 24. Towers with a class token are
    read by its attention, in the release by that of all rows. Neighbours at the edge wrap into the
    next row, as in the release.
    """

    revision = 2  # 1: one block later
    summary = "attention of a middle and the last block of the tower (HiPrune 2508.00553)"
    traits = Traits(grid="known", batched=True)
    needs = frozenset({MIDDLE, TOWER_ATTENTION})

    def reduce(self, tokens: Tokens) -> Kept:
        both = [tower_signal(tokens, signal, "hiprune") for signal in (MIDDLE, TOWER_ATTENTION)]
        attentions = finite_values(torch.stack(both, 1), "attentions of the vision tower")
        middle, last = attentions.unbind(1)
        counts = [round(budget * ANCHORS) for budget in tokens.budgets]
        anchors = best_rows(middle, counts, tokens.lengths)
        # Cells of one span after those of the other: its first one, its last one, its width.
        ends = np.cumsum([t * h * w for t, h, w in tokens.grids])
        firsts = [0, *ends[:-1].tolist()]
        edges = np.stack([firsts, ends - 1, [w for *_, w in tokens.grids]], 1)
        first, final, w = tokens.table(np.repeat(edges, counts, axis=0))[:, :, None].unbind(1)
        cells = tokens.cells() + tokens.per_patch(firsts)
        down, right = w.new_tensor([[0, 0, 0, -1, 1], [0, -1, 1, 0, 0]])
        near = (cells[anchors][:, None] + w * down + right).clamp(first, final)
        chosen = torch.zeros(int(ends[-1]), dtype=torch.bool, device=near.device)
        chosen[near] = True
        # Tokens that stay anyway stand before all others.
        last = last.masked_fill(chosen[cells], torch.inf)
        return Kept(best_rows(last, tokens.budgets, tokens.lengths))
