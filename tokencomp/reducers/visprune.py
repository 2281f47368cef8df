"""Comparator: salient tokens, and diverse ones among the rest."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from tokencomp.plan.reducer import Traits
from tokencomp.reducers._batch import salient
from tokencomp.reducers.base import Reducer
from tokencomp.reducers.registry import register_reducer
from tokencomp.tokens.kept import Kept
from tokencomp.tokens.signals import TOWER_ATTENTION
from tokencomp.tokens.stacks import HostIndex, Stack, by_stack, masked, padded
from tokencomp.tokens.tokens import Tokens, rows_where

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

    traits = Traits(batched=True)
    summary = "salient tokens, then the rest without its copies (VisPruner 2412.01818)"
    needs = frozenset({TOWER_ATTENTION})

    def reduce(self, tokens: Tokens) -> Kept:
        x, attention = salient(tokens, "visprune")

        def stays(spans: HostIndex, stack: Stack, unit: Tensor, attention: Tensor) -> Tensor:
            budgets = np.asarray(tokens.budgets)[spans]
            attention = masked(attention, stack.lengths, -torch.inf)
            order = attention.sort(dim=1, descending=True, stable=True).indices
            half = budgets // 2
            diverse = without_copies(unit, order, half, stack.lengths - half, budgets - half)
            important = torch.from_numpy(np.arange(stack.longest) < half[:, None]).to(order.device)
            mask = torch.empty_like(important).scatter_(1, order, important)
            return mask.scatter_(1, diverse, True)

        kept = by_stack(tokens.lengths, stays, normalize(x, dim=1), attention)
        return Kept(rows_where(kept, sum(tokens.budgets)))


def without_copies(
    unit: Tensor, order: Tensor, firsts: HostIndex, lengths: HostIndex, keep: HostIndex
) -> Tensor:
    """`keep` rows of every span's list, by the method's rounds, (spans, most of them).

    All spans are in the same round. Short lists repeat a row.

    Parameters
    ----------
    unit : Tensor, shape (spans, n, d)
    order : Tensor of int64, shape (spans, m)
        Rows of `unit`, of which `lengths` from `firsts` on are the list of a span.
    """

    def table(values: HostIndex) -> Tensor:
        return torch.from_numpy(values).to(unit.device)

    similarity, span = unit @ unit.mT, torch.arange(len(unit), device=unit.device)[:, None, None]
    places = order.gather(1, table(padded(firsts, lengths)))
    while (lengths > keep).any():
        odd, even, first = places[:, ::2], places[:, 1::2], (lengths + 1) // 2
        near = similarity[span, odd[:, :, None], even[:, None]]
        near = masked(masked(near, lengths - first, -torch.inf).amax(2), first, -torch.inf)
        order = near.sort(dim=1, descending=True, stable=True).indices
        gone = np.minimum(np.minimum(lengths - keep, STEP), first)
        rest = padded(gone, lengths - gone)
        # Even places stand behind the odd ones of the longest list.
        rest += (rest >= first[:, None]) * (odd.shape[1] - first)[:, None]
        places = torch.cat([odd.gather(1, order), even], 1).gather(1, table(rest))
        lengths = lengths - gone
    return places
