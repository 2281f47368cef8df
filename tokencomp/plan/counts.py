"""Checked ratios, and whole numbers of tokens from fractions."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from tokencomp.errors import PlanError, RatioError

MAX_RATIO = 0.95


def check_ratio(ratio: float | str, name: str = "ratio") -> float:
    """Return `ratio` as a float in [0, 1); raise `RatioError` otherwise.

    Parameters
    ----------
    name
        Of the argument, for the message.
    """
    try:
        value = float(ratio)
    except (TypeError, ValueError, OverflowError):  # of integers that no float can hold
        value = math.nan
    if not 0.0 <= value < 1.0:
        raise RatioError(
            f"{name}={ratio!r}: expected a number in [0, 1), the fraction of visual-token work to "
            f"remove (0 = off, 0.75 = a quarter is left). Use e.g. {name}=0.5."
        )
    return value


def keep_count(total: int, fraction: float, special: int = 0) -> int:
    """Tokens that stay of `total` at `fraction`, ties rounded up (ours).

    Parameters
    ----------
    total
        Tokens of the uncompressed span, special ones included.
    fraction
        Fraction to keep. 0 drops the whole span; anything more leaves every special token and
        at least one patch.
    special
        How many of `total` are special.
    """
    if fraction <= 0.0 or total == 0:
        return 0
    rounded = math.floor(total * fraction + 0.5 + 1e-9)
    return min(total, max(rounded, special + (1 if total > special else 0)))


def split_evenly(total: int, counts: list[int]) -> list[int]:
    """Split `total` over groups in proportion to `counts`: whole numbers with exactly that sum.

    No group gets more than its count, as long as `total` is not above the sum of the counts. If
    there is less than one per group, the last group of every run of groups gets it.
    """
    everything = max(sum(counts), 1)
    ends = [total * c // everything for c in itertools.accumulate(counts, initial=0)]
    return [b - a for a, b in itertools.pairwise(ends)]


def frame_budgets(
    weights: Sequence[float], total: int, most: Sequence[int], least: int = 0
) -> list[int]:
    """Split `total` tokens over frames in proportion to `weights`: whole numbers of that sum.

    Every frame gets `least`, where the total allows it, and its share of the rest. Shares are
    rounded down, and what is left over goes to the largest remainders, one token each; ties go to
    the lower frame. What a full frame cannot take, the others get in the same order.

    Parameters
    ----------
    weights
        At least 0; of frames that all have 0, each has the same share.
    most
        Tokens of every frame; `total` is at most their sum.

    Raises
    ------
    PlanError
        More tokens than all frames hold.
    """
    if total > sum(most):
        raise PlanError(
            f"{total} tokens of frames that hold {sum(most)}. Ask for at most as many as there are."
        )
    base = [min(least, n) for n in most]
    if sum(base) > total:
        base = [0] * len(base)
    everything, rest = sum(weights), total - sum(base)
    if everything <= 0:
        weights, everything = [1.0] * len(base), float(len(base))
    shares = [b + w / everything * rest for b, w in zip(base, weights, strict=True)]
    budgets = [min(n, int(share)) for n, share in zip(most, shares, strict=True)]
    order = sorted(range(len(shares)), key=lambda i: (round(int(shares[i]) - shares[i], 9), i))
    while (missing := total - sum(budgets)) > 0:
        for i in [i for i in order if budgets[i] < most[i]][:missing]:
            budgets[i] += 1
    return budgets
