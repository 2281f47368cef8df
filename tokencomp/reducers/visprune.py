"""Comparator: salient tokens, and diverse ones among the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from tokencomp.reducers._batch import by_group, rows_where
from tokencomp.reducers._rows import salient_patches
from tokencomp.reducers.base import Reducer
from tokencomp.reducers.registry import register_reducer
from tokencomp.tokens.reduction import Reduction
from tokencomp.tokens.signals import TOWER_ATTENTION
from tokencomp.tokens.spans import SpanBatch

STEP = 8  # tokens that leave per round


@register_reducer("visprune")
@dataclass(frozen=True)
class VisPrune(Reducer):
    """Half of the budget by the vision tower's attention, half by what is left once copies leave.

    VisPruner (arXiv 2412.01818). ⌊K/2⌋ tokens are those with the largest attention in the tower.
    The others stand in a list by falling attention. In every round its odd places (the first,
    third, …) are compared with its even ones: the 8 of them that resemble an even one most (largest
    cosine) leave, and the list goes on with the survivors, most similar first, and the even ones
    behind them, until the budget is met.

    Notes
    -----
    Features are those after the projector, in the release those before it. Where the list has odd
    length the release stops with an error; here the odd places are one more. AngelSlim's copy
    begins in raster order and keeps other tokens. All cosines of a span are held at once: 4·n²
    bytes.
    """

    summary = "salient tokens, then the rest without its copies (VisPruner 2412.01818)"
    needs = frozenset({TOWER_ATTENTION})

    def reduce_batch(self, batch: SpanBatch, keeps: Sequence[int]) -> Reduction:
        patches, x, attention = salient_patches(batch, keeps, "visprune")

        def stays(members: list[int], x: Tensor, attention: Tensor) -> Tensor:
            attention, budget = attention.view(len(members), -1), patches.budgets[members[0]]
            order = attention.sort(dim=1, descending=True, stable=True).indices
            important, others = order[:, : budget // 2], order[:, budget // 2 :]
            unit = normalize(x, dim=1).view(*attention.shape, -1)
            diverse = without_copies(unit, others, budget - budget // 2)
            mask = torch.zeros_like(attention, dtype=torch.bool)
            return mask.scatter_(1, torch.cat([important, diverse], 1), True).flatten()

        shapes = list(zip(patches.lengths, patches.budgets, strict=True))
        kept = by_group(patches, shapes, stays, x, attention, pairs=True)
        return patches.kept(rows_where(kept, sum(patches.budgets)))


def without_copies(unit: Tensor, places: Tensor, keep: int) -> Tensor:
    """`keep` of `places` (spans, m), lists of rows of `unit` (spans, n, d), by the method's rounds.

    All spans are in the same round.
    """
    similarity, span = unit @ unit.mT, torch.arange(len(unit), device=unit.device)[:, None, None]
    while (excess := places.shape[1] - keep) > 0:
        odd, even = places[:, ::2], places[:, 1::2]
        nearest = similarity[span, odd[:, :, None], even[:, None]].amax(2)
        order = nearest.sort(dim=1, descending=True, stable=True).indices
        places = torch.cat([odd.gather(1, order[:, min(STEP, excess) :]), even], 1)
    return places
