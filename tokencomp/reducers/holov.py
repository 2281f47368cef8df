"""Comparator: a budget for every crop of a picture."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tokencomp.plan.counts import split_evenly
from tokencomp.reducers._rows import finite_values, keep_patches, patch_rows, tower_signal
from tokencomp.reducers.base import Reducer
from tokencomp.reducers.registry import register_reducer
from tokencomp.tokens.reduction import Reduction
from tokencomp.tokens.signals import TOWER_ATTENTION
from tokencomp.tokens.spans import VisualTokens

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

    summary = "budgets of crops by tower attention (HoloV 2510.02912)"
    needs = frozenset({TOWER_ATTENTION})

    def reduce(self, tokens: VisualTokens, keep: int) -> Reduction:
        from tokencomp.kernels import topk_stable

        rows, budget = patch_rows(tokens, keep)
        attention = tower_signal(tokens, TOWER_ATTENTION, "holov")[rows]
        attention = finite_values(attention, "attentions of the vision tower")
        n = len(rows)
        crops = min(n, max(1, int(CROP * n / budget)))
        lengths = [n // crops + (i < n % crops) for i in range(crops)]
        means = torch.stack([part.mean() for part in attention.split(lengths)]).tolist()
        kept = topk_stable(attention, crop_budgets(means, budget, lengths), spans=lengths)
        return keep_patches(tokens, rows[kept])


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
