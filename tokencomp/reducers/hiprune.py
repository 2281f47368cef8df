"""HiPrune: attention of a middle and the last block of the vision tower (arXiv 2508.00553)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from tokencomp.reducers import Kept, Published, Tokens, Traits, register_reducer
from tokencomp.reducers.base import best_rows, finite_values, tower_signal
from tokencomp.tokens.signals import TOWER_ATTENTION, TowerSignal

ANCHORS = 0.1 / 5  # share of the budget; with the four neighbours 0.1
MIDDLE = TowerSignal("attention", 15 / 32)


@register_reducer("hiprune")
@dataclass(frozen=True)
class HiPrune(Published):
    """Anchors of a middle block with their neighbours, then the last block's attention.

    HiPrune (arXiv 2508.00553), with budget K:

        anchors:  the round(0.02 · K) tokens of largest attention in the middle block
        buffers:  the cells left, right, above and below each anchor
        register: the tokens of largest attention in the last block in use, until K are kept

    Deviations from the release:

    - Exactly K tokens are kept. On Qwen it marks chosen tokens by subtracting 1 from an attention
      that may exceed 1, and so chooses some twice.
    - The middle block is block ⌊15/32 · n⌋ of n, from 0: as there for Qwen2.5-VL. For LLaVA it
      takes the ninth of 24.
    - In towers with a class token, only the class token's attention counts; there all rows count.

    Neighbours at the edge wrap into the next row, as in the release.
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
        # Neighbours of the anchors, in cells numbered over all spans, clamped to their span.
        ends = np.cumsum([t * h * w for t, h, w in tokens.grids])
        firsts = [0, *ends[:-1].tolist()]
        edges = np.stack([firsts, ends - 1, [w for *_, w in tokens.grids]], 1)
        first, final, w = tokens.table(np.repeat(edges, counts, axis=0))[:, :, None].unbind(1)
        cells = tokens.cells() + tokens.per_patch(firsts)
        down, right = w.new_tensor([[0, 0, 0, -1, 1], [0, -1, 1, 0, 0]])
        near = (cells[anchors][:, None] + w * down + right).clamp(first, final)
        chosen = torch.zeros(int(ends[-1]), dtype=torch.bool, device=near.device)
        chosen[near] = True
        # Anchors and neighbours first, then the largest attention of the last block.
        last = last.masked_fill(chosen[cells], torch.inf)
        return Kept(best_rows(last, tokens.budgets, tokens.lengths))
