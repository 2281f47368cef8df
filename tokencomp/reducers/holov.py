"""Comparator: a budget for every crop of a picture."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from tokencomp.plan.counts import split_evenly
from tokencomp.plan.reducer import Traits
from tokencomp.reducers._batch import best_rows, finite_values, segment, tower_signal
from tokencomp.reducers.base import Reducer
from tokencomp.reducers.registry import register_reducer
from tokencomp.tokens.kept import Kept
from tokencomp.tokens.signals import TOWER_ATTENTION
from tokencomp.tokens.tokens import Tokens

CROP = 1024 / 576  # crops per kept share of the tokens


@register_reducer("holov")
@dataclass(frozen=True)
class HoloV(Reducer):
    """Split a picture into crops, and keep of each the tokens that the vision tower attends to.

    HoloV (arXiv 2510.02912). max(1, ⌊(1024/576) · n / K⌋) crops are runs of equal length in raster
    order (16 of 36 for 64 of 576 tokens). A crop gets its share of K by its mean attention, rounded
    down, and the crops of the largest share one more each; in a crop the tokens with the largest
    attention stay.

    Notes
    -----
    The paper scores a crop by the mean of a_i + 0.09 · V_i · mean(a) / mean(V), V the variance of
    the cosines of a token in its crop. That mean is 1.09 · mean(a) whatever V is, so that in the
    release, too, the variance changes nothing (but for crops of one token, which count less there).
    What a crop cannot hold the next ones get, and rows stay in raster order; the release fills up
    with rows of zeros, and orders a crop by attention.
    """

    traits = Traits(batched=True)
    summary = "budgets of crops by tower attention (HoloV 2510.02912)"
    needs = frozenset({TOWER_ATTENTION})

    def reduce(self, tokens: Tokens) -> Kept:
        attention = tower_signal(tokens, TOWER_ATTENTION, "holov")
        attention = finite_values(attention, "attentions of the vision tower")
        crops = [crop_lengths(n, k) for n, k in zip(tokens.lengths, tokens.budgets, strict=True)]
        lengths = list(itertools.chain(*crops))
        sums = iter(segment(attention.double(), lengths, "sum").tolist())
        budgets = []
        for own, budget in zip(crops, tokens.budgets, strict=True):
            budgets += crop_budgets([next(sums) / n for n in own], budget, own)
        return Kept(best_rows(attention, budgets, lengths))


def crop_lengths(n: int, budget: int) -> list[int]:
    """Patches of every crop of a picture of n patches, of which `budget` stay."""
    crops = min(n, max(1, int(CROP * n / budget)))
    return [n // crops + (i < n % crops) for i in range(crops)]


def crop_budgets(weights: list[float], total: int, most: list[int]) -> list[int]:
    """Shares of `total` by weight, rounded down; the heaviest crops get what is left over."""
    everything = sum(weights)
    if everything <= 0:
        return split_evenly(total, most)
    shares = [total * weight / everything for weight in weights]
    budgets = [min(n, int(share + 1e-9)) for share, n in zip(shares, most, strict=True)]
    order = sorted(range(len(weights)), key=lambda i: (-weights[i], i))
    while (missing := total - sum(budgets)) > 0:
        for i in [i for i in order if budgets[i] < most[i]][:missing]:
            budgets[i] += 1
    return budgets
