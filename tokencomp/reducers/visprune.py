"""Comparator: salient tokens, and diverse ones among the rest."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from tokencomp.reducers._rows import keep_patches, salient_rows
from tokencomp.reducers.base import Reducer
from tokencomp.reducers.registry import register_reducer
from tokencomp.tokens.reduction import Reduction
from tokencomp.tokens.signals import TOWER_ATTENTION
from tokencomp.tokens.spans import VisualTokens

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

    def reduce(self, tokens: VisualTokens, keep: int) -> Reduction:
        rows, budget, x, attention = salient_rows(tokens, keep, "visprune")
        order = attention.sort(descending=True, stable=True).indices
        important, others = order.split([budget // 2, len(order) - budget // 2])
        diverse = without_copies(normalize(x, dim=1), others, budget - budget // 2)
        return keep_patches(tokens, rows[torch.cat([important, diverse])])


def without_copies(unit: Tensor, places: Tensor, keep: int) -> Tensor:
    """`keep` of `places`, a list of rows of `unit` (n, d), by the rounds of the method."""
    similarity = unit @ unit.T
    while (excess := len(places) - keep) > 0:
        odd, even = places[::2], places[1::2]
        nearest = similarity[odd][:, even].amax(1)
        survivors = nearest.sort(descending=True, stable=True).indices[min(STEP, excess) :]
        places = torch.cat([odd[survivors], even])
    return places
