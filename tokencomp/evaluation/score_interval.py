"""Score intervals of paired scores: differences (Tango 1998) and ratios (Tang, Tang, Chan 2003).

A value θ of the statistic says that a residual z of every item has the mean 0:

    difference δ:  z = a - b - δ          ratio ρ:  z = a - ρ·b

The interval holds the values θ that a score test at 95 % does not reject:

    n · mean(z)² / E[z²] ≤ 3.84,   E under the most likely distribution in which E[z] = 0

Of right (1) and wrong (0) answers this is Tango's interval: of 36 items, 2 that only a got right
and 1 that only b got right give 2.8 points, from -9.6 to 16.0. Scores between 0 and 1, such as the
mean of three seeds of `random`, have more categories, with the same test.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

LIMIT = 1.959963984540054**2
"""95 % quantile of chi² with one degree of freedom."""
STEPS = 40  # halvings, after which an interval has 1e-12 of its width


def difference_interval(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """Interval of mean(a) - mean(b) for non-negative scores of shape (n,)."""
    scores, counts, top = _categories(a, b)

    def residual(delta: float) -> np.ndarray:
        return scores[:, 0] - scores[:, 1] - delta

    value = float(a.mean() - b.mean())
    return _end(residual, counts, value, -top), _end(residual, counts, value, top)


def ratio_interval(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """Interval of mean(a) / mean(b) for non-negative scores of shape (n,), some of b above 0."""
    scores, counts, _ = _categories(a, b)

    def residual(share: float) -> np.ndarray:  # ρ = share / (1 - share), so that it is finite
        return (1 - share) * scores[:, 0] - share * scores[:, 1]

    value = float(a.mean() / (a.mean() + b.mean()))
    low, high = (_end(residual, counts, value, bound) for bound in (0.0, 1.0))
    return low / (1 - low), high / (1 - high)


def _categories(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Pairs of scores (k, 2), how often each was seen, and the largest possible score.

    Pairs of the smallest and the largest score are categories also where none was seen.
    """
    top = max(1.0, float(a.max()), float(b.max()))
    corners = np.array([(0.0, 0.0), (0.0, top), (top, 0.0), (top, top)])
    seen = np.concatenate([np.stack([a, b], axis=1), corners])
    scores, which = np.unique(seen, axis=0, return_inverse=True)
    weights = np.repeat([1.0, 0.0], [len(a), len(corners)])
    return scores, np.bincount(which.reshape(-1), weights, len(scores)), top


def _end(
    residual: Callable[[float], np.ndarray], counts: np.ndarray, value: float, bound: float
) -> float:
    """The value between `value` and `bound` at which the test begins to reject."""
    if value == bound:
        return bound
    n = counts.sum()
    for _ in range(STEPS):
        middle = (value + bound) / 2
        z = residual(middle)
        if (counts @ z) ** 2 / n <= LIMIT * _second_moment(z, counts):
            value = middle
        else:
            bound = middle
    return (value + bound) / 2


def _second_moment(z: np.ndarray, counts: np.ndarray) -> float:
    """E[z²] under the probabilities of largest likelihood with E[z] = 0.

    These are p = counts / (n · (1 + λz)), where λ solves E[z] = 0. At the ends of λ, where 1 + λz
    of an extreme category that was not seen is 0, that category has what is missing to 1.
    """
    seen = counts > 0
    x, k = z[seen], counts[seen] / counts.sum()
    multiplier = _multiplier(x, k, z.min(), z.max())
    p = k / (1 + multiplier * x)
    extreme = z.max() if multiplier < 0 else z.min()
    return float(p @ x**2 + max(1 - p.sum(), 0.0) * extreme**2)


def _multiplier(x: np.ndarray, k: np.ndarray, least: float, most: float) -> float:
    """The root λ of Σ k·x / (1 + λx), which falls with λ, in [-1 / most, -1 / least].

    At an end where the sum has the other sign there is no root, if x lacks the extreme value.
    """
    low, high = -1 / most, -1 / least
    if x.max() < most and k @ (x / (1 + low * x)) <= 0:
        return low
    if x.min() > least and k @ (x / (1 + high * x)) >= 0:
        return high
    found = 0.0
    for _ in range(STEPS):  # Newton's steps, or halvings where one leaves the interval
        terms = x / (1 + found * x)
        value = float(k @ terms)
        low, high = (found, high) if value > 0 else (low, found)
        step = value / float(k @ terms**2)
        if abs(step) < 1e-12 * (high - low):
            break
        found = found + step if low < found + step < high else (low + high) / 2
    return found
