"""HoloV: budgets of image crops by attention (arXiv 2510.02912)."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from tokencomp.plan.counts import split_evenly
from tokencomp.reducers import Kept, Reducer, Tokens, Traits, register_reducer
from tokencomp.reducers._batch import segment
from tokencomp.reducers.base import best_rows, finite_values, tower_signal
from tokencomp.tokens.signals import TOWER_ATTENTION

CROP = 1024 / 576  # crops per n / K


@register_reducer("holov")
@dataclass(frozen=True)
class HoloV(Reducer):
    """Split an image into crops, and keep of each the tokens that the vision tower attends to.

    HoloV (arXiv 2510.02912). With n tokens, budget K and attention a_i of the tower:

        C   = max(1, ⌊(1024/576) · n / K⌋) crops of equal length in raster order
        K_c = ⌊K · ā_c / Σ ā⌋,  ā_c: mean attention of crop c; crops of largest ā_c get one more
              until the sum is K

    In every crop the K_c tokens of largest a_i are kept.

    Deviations from the paper and its release:

    - The paper scores a crop by the mean of a_i + 0.09 · V_i · mean(a) / mean(V), V_i the variance
      of token i's cosines in its crop. This mean is 1.09 · mean(a) for any V, so V is left out. In
      the release it matters only for crops of one token.
    - What a crop cannot hold goes to the next ones; the release fills up with rows of zeros.
    - Tokens stay in raster order; the release orders a crop by attention.
    """

    traits = Traits(batched=True)
    summary = "budgets of crops by tower attention (HoloV 2510.02912)"
    needs = frozenset({TOWER_ATTENTION})

    def reduce(self, tokens: Tokens) -> Kept:
        attention = tower_signal(tokens, TOWER_ATTENTION, "holov")
        attention = finite_values(attention, "attentions of the vision tower")
        # Crops share the budget by their mean attention; then top-k within every crop.
        crops = [crop_lengths(n, k) for n, k in zip(tokens.lengths, tokens.budgets, strict=True)]
        lengths = list(itertools.chain(*crops))
        sums = iter(segment(attention.double(), lengths, "sum").tolist())
        budgets = []
        for sizes, budget in zip(crops, tokens.budgets, strict=True):
            budgets += crop_budgets([next(sums) / n for n in sizes], budget, sizes)
        return Kept(best_rows(attention, budgets, lengths))


def crop_lengths(n: int, budget: int) -> list[int]:
    """Patches of every crop of an image of n patches with this budget."""
    crops = min(n, max(1, int(CROP * n / budget)))
    return [n // crops + (i < n % crops) for i in range(crops)]


def crop_budgets(weights: list[float], total: int, most: list[int]) -> list[int]:
    """Shares of `total` by weight, rounded down; the heaviest crops get the remaining tokens."""
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
