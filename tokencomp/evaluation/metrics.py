"""Accuracy under compression, with paired intervals and the exact McNemar test."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tokencomp.errors import OptionError
from tokencomp.evaluation.score_interval import difference_interval, ratio_interval


@dataclass(frozen=True)
class Paired:
    """A statistic of two methods on the same items, with its paired 95 % interval.

    The interval is the score interval of `tokencomp.evaluation.score_interval`.
    """

    value: float
    low: float
    high: float
    items: int


class Retention(Paired):
    """mean(compressed) / mean(full); NaN if the full model scores 0."""

    def __str__(self) -> str:
        if self.value != self.value:
            return "–"
        return f"{self.value:.1%} [{self.low:.1%}, {self.high:.1%}]"


class Difference(Paired):
    """Difference of two accuracies."""

    def __str__(self) -> str:
        low, high = 100 * self.low, 100 * self.high
        return f"{100 * self.value:+.1f} [{low:+.1f}, {high:+.1f}]"


@dataclass(frozen=True)
class McNemar:
    """Exact two-sided McNemar test of two methods on the same items.

    `wins` items only the first got right, `losses` only the second.
    """

    wins: int
    losses: int
    p: float


def _paired(first: Sequence[float], second: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if a.ndim != 1 or a.shape != b.shape or not a.size:
        raise OptionError(
            f"scores of shape {a.shape} and {b.shape}: expected one score per item, the same "
            "items in the same order, and at least one item."
        )
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise OptionError("scores hold NaN or infinity; leave failed items out of both runs.")
    return a, b


def retention(compressed: Sequence[float], full: Sequence[float]) -> Retention:
    """Mean of `compressed` divided by the mean of `full`.

    Both are scores per item, in the same order; 0 or 1, or anything non-negative. Raises
    `OptionError` for different lengths, no items, or scores that are not finite.
    """
    a, b = _paired(compressed, full)
    if not b.any():
        return Retention(math.nan, math.nan, math.nan, a.size)
    return Retention(float(a.sum() / b.sum()), *ratio_interval(a, b), a.size)


def difference(first: Sequence[float], second: Sequence[float]) -> Difference:
    """Mean of `first` minus mean of `second`. Parameters and errors as in `retention`."""
    a, b = _paired(first, second)
    return Difference(float(a.mean() - b.mean()), *difference_interval(a, b), a.size)


def mcnemar(first: Sequence[float], second: Sequence[float]) -> McNemar:
    """Exact McNemar test: under the null, discordant items fall either way with probability ½.

    Scores are right (1) or wrong (0) per item in the same order; fractions are right from ½ on.
    Raises `OptionError` as `retention`.
    """
    a, b = _paired(first, second)
    right, other = a >= 0.5, b >= 0.5
    wins, losses = int((right & ~other).sum()), int((~right & other).sum())
    n = wins + losses
    tail = sum(math.comb(n, k) for k in range(min(wins, losses) + 1))
    return McNemar(wins, losses, min(1.0, 2 * tail / 2**n))
