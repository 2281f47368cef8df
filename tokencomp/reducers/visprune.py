"""VisPruner: salient tokens, and diverse ones of the rest (arXiv 2412.01818)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from tokencomp.reducers import Kept, Reducer, Tokens, Traits, register_reducer
from tokencomp.reducers.base import salient
from tokencomp.tokens.signals import TOWER_ATTENTION
from tokencomp.tokens.stacks import HostIndex, Stack, by_stack, masked, padded
from tokencomp.tokens.tokens import rows_where

STEP = 8  # tokens removed per round


@register_reducer("visprune")
@dataclass(frozen=True)
class VisPrune(Reducer):
    """Half of the budget by the vision tower's attention, half by removing similar tokens.

    VisPruner (arXiv 2412.01818), with budget K:

        important = the ⌊K/2⌋ tokens of largest attention in the tower
        diverse   : list the others by falling attention, then repeat until K - ⌊K/2⌋ remain:
                    A, B = odd and even positions of the list (the first is odd)
                    r(a) = max over b ∈ B of cos(x_a, x_b), for a ∈ A
                    remove the 8 tokens a of largest r(a); the list is A by falling r, then B

    Deviations from the release:

    - Features are those after the projector; there those before it.
    - If the list has odd length, A has one more token; the release stops with an error.

    AngelSlim's copy begins in raster order and keeps other tokens. All cosines of a span are held
    at once: 4·n² bytes.
    """

    traits = Traits(batched=True)
    summary = "salient tokens, then the rest without its copies (VisPruner 2412.01818)"
    needs = frozenset({TOWER_ATTENTION})

    def reduce(self, tokens: Tokens) -> Kept:
        x, attention = salient(tokens, "visprune")

        def kept(spans: HostIndex, stack: Stack, unit: Tensor, attention: Tensor) -> Tensor:
            budgets = np.asarray(tokens.budgets)[spans]
            attention = masked(attention, stack.lengths, -torch.inf)
            order = attention.sort(dim=1, descending=True, stable=True).indices
            half = budgets // 2
            diverse = without_copies(unit, order, half, stack.lengths - half, budgets - half)
            important = stack.table(np.arange(stack.longest) < half[:, None])
            mask = torch.empty_like(important).scatter_(1, order, important)
            return mask.scatter_(1, diverse, True)

        mask = by_stack(tokens.lengths, kept, normalize(x, dim=1), attention)
        return Kept(rows_where(mask, sum(tokens.budgets)))


def without_copies(
    unit: Tensor, order: Tensor, firsts: HostIndex, lengths: HostIndex, keep: HostIndex
) -> Tensor:
    """The diverse tokens, `keep` of every span's list, (spans, most of them); short lists repeat a
    row.

    The list of a span is `lengths` of the rows of `order` (spans, m), from `firsts` on.
    """

    def table(values: HostIndex) -> Tensor:
        return torch.from_numpy(values).to(unit.device)

    similarity, span = unit @ unit.mT, torch.arange(len(unit), device=unit.device)[:, None, None]
    listed = order.gather(1, table(padded(firsts, lengths)))
    while (lengths > keep).any():
        # r(a), without the padding of short lists.
        odd, even, n_odd = listed[:, ::2], listed[:, 1::2], (lengths + 1) // 2
        r = similarity[span, odd[:, :, None], even[:, None]]
        r = masked(masked(r, lengths - n_odd, -torch.inf).amax(2), n_odd, -torch.inf)
        order = r.sort(dim=1, descending=True, stable=True).indices
        # The new list: odd positions by falling r without the first ones, then even positions,
        # which begin after the odd positions of the longest list.
        removed = np.minimum(np.minimum(lengths - keep, STEP), n_odd)
        rest = padded(removed, lengths - removed)
        rest += (rest >= n_odd[:, None]) * (odd.shape[1] - n_odd)[:, None]
        listed = torch.cat([odd.gather(1, order), even], 1).gather(1, table(rest))
        lengths = lengths - removed
    return listed
