"""Accuracy under compression, with paired intervals and the exact McNemar test."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from tokencomp.errors import OptionError

RESAMPLES = 10_000
FEW = 30
"""Below so many items, an interval without width counts as none."""
UNBOUNDED = f"(n < {FEW})"
"""What stands in its place."""


@dataclass(frozen=True)
class Paired:
    """A statistic of two methods on the same items, with its paired bootstrap interval, 95 %."""

    value: float
    low: float
    high: float
    items: int

    @property
    def bounded(self) -> bool:
        """Whether there is an interval.

        The bootstrap draws from the items alone: where all are alike, its interval has no width,
        which says nothing if they are few.
        """
        return self.low < self.high or (self.low == self.high and not 0 < self.items < FEW)


class Retention(Paired):
    """mean(compressed) / mean(full); NaN if the full model scores 0."""

    def __str__(self) -> str:
        if self.value != self.value:
            return "–"
        if not self.bounded:
            return f"{self.value:.1%} {UNBOUNDED}"
        return f"{self.value:.1%} [{self.low:.1%}, {self.high:.1%}]"


class Difference(Paired):
    """Difference of two accuracies."""

    def __str__(self) -> str:
        if not self.bounded:
            return f"{100 * self.value:+.1f} {UNBOUNDED}"
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
    """Retention with a paired bootstrap interval: items are drawn, both scores come along.

    Parameters
    ----------
    compressed, full
        Scores per item, in the same order; 0 or 1, or anything non-negative.
    resamples, seed
        Bootstrap draws, at least one, and the seed of their generator.

    Raises
    ------
    OptionError
        Different lengths, no items, scores that are not finite, or no draws.
    """
    a, b = _paired(compressed, full)

    def ratio(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore"):
            return x.sum(-1) / y.sum(-1)

    return Retention(*_bootstrap(a, b, ratio, resamples, seed))


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

    return Difference(*_bootstrap(a, b, gap, resamples, seed))


def _bootstrap(
    a: np.ndarray,
    b: np.ndarray,
    statistic: Callable[[np.ndarray, np.ndarray], np.ndarray],
    resamples: int,
    seed: int,
) -> tuple[float, float, float, int]:
    """Value, interval and number of items of a statistic of paired scores."""
    if resamples < 1:
        raise OptionError(f"resamples={resamples}: expected at least one draw, e.g. {RESAMPLES}.")
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

    Parameters
    ----------
    first, second
        Right (1) or wrong (0) per item, in the same order; fractional scores count as right
        from ½ on.

    Raises
    ------
    OptionError
        Different lengths, no items, or scores that are not finite.
    """
    a, b = _paired(first, second)
    right, other = a >= 0.5, b >= 0.5
    wins, losses = int((right & ~other).sum()), int((~right & other).sum())
    n = wins + losses
    tail = sum(math.comb(n, k) for k in range(min(wins, losses) + 1))
    return McNemar(wins, losses, min(1.0, 2 * tail / 2**n))
