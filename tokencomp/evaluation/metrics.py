"""Accuracy under compression, with paired intervals and the exact McNemar test."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from tokencomp.errors import OptionError

RESAMPLES = 10_000
LEVEL = 0.05
"""Probability with which an interval may miss the truth."""


@dataclass(frozen=True)
class Paired:
    """A statistic of two methods on the same items, with its paired 95 % interval.

    The interval is that of the bootstrap. Where all items say the same, as when two methods answer
    every one alike, it would have no width; then it is the exact one (Clopper and Pearson 1934) for
    a share of items that say something else, of which none was seen.
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


def retention(
    compressed: Sequence[float],
    full: Sequence[float],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Retention:
    """Retention with a paired interval: items are drawn, both scores come along.

    Parameters
    ----------
    compressed, full
        Scores per item, in the same order; 0 or 1, or anything non-negative.
    resamples, seed
        Bootstrap draws, and the seed of their generator.

    Raises
    ------
    OptionError
        Different lengths, no items, or scores that are not finite.
    """
    a, b = _paired(compressed, full)

    def ratio(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore"):
            return x.sum(-1) / y.sum(-1)

    value, low, high, n = _bootstrap(a, b, ratio, resamples, seed)
    if low == high:  # of items that scored otherwise, the full model's mean is the measure
        margin, most = _unseen(a, b) / b.mean(), max(a.max(), b.max(), 1.0) / b.mean()
        low, high = max(value - margin, 0.0), max(min(value + margin, most), value)
    return Retention(value, low, high, n)


def difference(
    first: Sequence[float],
    second: Sequence[float],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Difference:
    """Mean of `first` minus mean of `second`. Parameters and errors as in `retention`."""
    a, b = _paired(first, second)

    def gap(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return x.mean(-1) - y.mean(-1)

    value, low, high, n = _bootstrap(a, b, gap, resamples, seed)
    if low == high:
        margin, most = _unseen(a, b), max(a.max(), b.max(), 1.0)
        low, high = max(value - margin, -most), min(value + margin, most)
    return Difference(value, low, high, n)


def _unseen(a: np.ndarray, b: np.ndarray) -> float:
    """The most that items unlike all n seen ones can change a mean, at `LEVEL`, two-sided."""
    return float((1 - (LEVEL / 2) ** (1 / a.size)) * max(a.max(), b.max(), 1.0))


def _bootstrap(
    a: np.ndarray,
    b: np.ndarray,
    statistic: Callable[[np.ndarray, np.ndarray], np.ndarray],
    resamples: int,
    seed: int,
) -> tuple[float, float, float, int]:
    """Value, interval and number of items of a statistic of paired scores."""
    rng, n = np.random.default_rng(seed), a.size
    values = np.empty(resamples)
    step = max(1, 2_000_000 // n)
    for start in range(0, resamples, step):
        draw = rng.integers(n, size=(min(step, resamples - start), n))
        values[start : start + step] = statistic(a[draw], b[draw])
    values = values[np.isfinite(values)]
    low, high = np.quantile(values, [0.025, 0.975]) if values.size else (math.nan, math.nan)
    value = float(statistic(a, b))
    return value if math.isfinite(value) else math.nan, float(low), float(high), n


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
