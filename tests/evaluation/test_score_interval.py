"""Score intervals of pairs against Tango's closed form, and against a search over distributions."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from tokencomp.evaluation.metrics import difference, retention

Z = 1.959963984540054


def pairs(both: int, first: int, second: int, neither: int) -> tuple[list[int], list[int]]:
    """Right (1) and wrong (0) answers of two methods, from the four counts of a table."""
    counts = both, first, second, neither
    a = [x for x, n in zip((1, 1, 0, 0), counts, strict=True) for _ in range(n)]
    b = [x for x, n in zip((1, 0, 1, 0), counts, strict=True) for _ in range(n)]
    return a, b


def tango(first: int, second: int, n: int) -> tuple[float, float]:
    """The ends by bisection of the statistic of Tango (1998), whose nuisance has a closed form."""

    def statistic(delta: float) -> float:
        a, c = 2 * n, -second * delta * (1 - delta)
        b = -first - second + (2 * n - first + second) * delta
        q = (math.sqrt(max(b * b - 4 * a * c, 0)) - b) / (2 * a)
        variance = n * (2 * q + delta * (1 - delta))
        gap = first - second - n * delta
        return gap / math.sqrt(variance) if variance > 1e-15 else math.copysign(math.inf, gap)

    def end(limit: float, low: float, high: float) -> float:
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if statistic(middle) > limit else (low, middle)
        return low

    value = (first - second) / n
    return end(Z, -1, value), end(-Z, value, 1)


@pytest.mark.parametrize(
    "table",
    [
        (34, 1, 0, 1), (36, 0, 0, 0), (0, 0, 0, 36), (0, 36, 0, 0), (1, 1, 7, 12), (600, 5, 12, 43),
        (0, 0, 1, 0), (0, 3, 2, 0), (60, 0, 10, 30), (10, 20, 5, 1),
    ],
)  # fmt: skip
def test_the_difference_of_right_answers_has_tangos_interval(table: tuple[int, ...]) -> None:
    found = difference(*pairs(*table))
    assert (found.low, found.high) == pytest.approx(tango(*table[1:3], sum(table)), abs=1e-9)
    other = difference(*reversed(pairs(*table)))
    assert (other.low, other.high) == pytest.approx((-found.high, -found.low), abs=1e-9)


def test_an_interval_has_the_unit_of_its_scores() -> None:
    """Four points for a right answer give four times the difference; shares stay."""
    a, b = (np.array(scores, float) for scores in pairs(20, 6, 2, 8))
    one, four = difference(a, b), difference(4 * a, 4 * b)
    assert (four.low, four.high) == pytest.approx((4 * one.low, 4 * one.high), abs=1e-9)
    assert retention(4 * a, 4 * b).high == pytest.approx(retention(a, b).high, abs=1e-9)


def most_likely(z: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Probabilities of largest likelihood with mean(z) = 0, by a grid that closes in on its best.

    Those of the smallest and the largest value that was seen follow from the others.
    """
    seen = sorted(np.flatnonzero(counts), key=lambda i: z[i])
    pivots = [seen[0], seen[-1]]
    order = np.array([*({*range(len(z))} - {*pivots}), *pivots])
    z, counts = z[order], counts[order]
    free = len(z) - 2
    low, high, best = np.zeros(free), np.ones(free), np.zeros(0)
    for _ in range(60):
        axes = [np.linspace(a, b, 9) for a, b in zip(low, high, strict=True)]
        inner = np.array([*itertools.product(*axes)])
        rest, moment = 1 - inner.sum(1), -inner @ z[:-2]
        last = (moment - rest * z[-2]) / (z[-1] - z[-2])
        p = np.column_stack([inner, rest - last, last])
        p = p[(p >= 0).all(1)]
        if not len(p):  # the first grid may be too coarse
            high = high / 2
            continue
        with np.errstate(divide="ignore", invalid="ignore"):
            fit = np.where(counts > 0, counts * np.log(p), 0).sum(1)
        best = p[fit.argmax()]
        width = 0.6 * (high - low)
        low, high = (np.clip(best[:-2] + s * width, 0, 1) for s in (-0.5, 0.5))
    return best[np.argsort(order)]


def rejected(z: np.ndarray, counts: np.ndarray) -> bool:
    n, mean = counts.sum(), counts @ z / counts.sum()
    return bool(n * mean**2 > Z**2 * (most_likely(z, counts) @ z**2))


def check_ends(
    found: tuple[float, float],
    values: np.ndarray,
    counts: np.ndarray,
    residual: Callable[[np.ndarray, float], np.ndarray],
    near: float = 1e-3,
) -> None:
    """Just inside of an end the test does not reject, just outside it does."""
    low, high = found
    for inside, outside in ((low + near, low - near), (high - near, high + near)):
        assert not rejected(residual(values, inside), counts)
        assert rejected(residual(values, outside), counts)


@pytest.mark.parametrize("table", [(20, 2, 6, 8), (30, 3, 1, 2), (12, 0, 4, 4), (30, 1, 0, 5)])
def test_retention_is_the_ratio_that_no_likely_distribution_rejects(table: tuple[int, ...]) -> None:
    found = retention(*pairs(*table))
    scores = np.array([(1, 1), (1, 0), (0, 1), (0, 0)], dtype=float)
    counts = np.array(table, dtype=float)
    check_ends((found.low, found.high), scores, counts, lambda s, r: s[:, 0] - r * s[:, 1])
    other = retention(*reversed(pairs(*table)))
    assert (1 / other.high, 1 / other.low) == pytest.approx((found.low, found.high))


@pytest.mark.parametrize("seeds", [[4, 6, 12], [0, 2, 10], [0, 9, 1]])
def test_the_mean_of_two_seeds_has_more_categories(seeds: Sequence[int]) -> None:
    """Against a method that is right in all items: differences 1, ½ and 0, and -1 unseen."""
    b = np.repeat([0, 0.5, 1], seeds)
    found = difference(np.ones(len(b)), b)
    values, counts = np.array([1, 0.5, 0, -1]), np.array([*seeds, 0], dtype=float)
    check_ends((found.low, found.high), values, counts, lambda d, delta: d - delta)


def test_more_changed_answers_never_make_a_narrower_interval() -> None:
    """Of 36 items, from none to six that one method alone got right."""
    widths = [(d := difference(*pairs(36 - k, k, 0, 0))).high - d.low for k in range(7)]
    assert widths == sorted(widths) and widths[0] > 0.1
