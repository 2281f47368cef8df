"""Statistics against brute force."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from tokencomp.errors import OptionError
from tokencomp.evaluation import mcnemar, retention
from tokencomp.evaluation.metrics import difference


def all_resamples(compressed: list[float], full: list[float]) -> np.ndarray:
    """Retention of every one of the n^n resamples of n items."""
    n, found = len(full), []
    for draw in itertools.product(range(n), repeat=n):
        below = sum(full[i] for i in draw)
        if below:
            found.append(sum(compressed[i] for i in draw) / below)
    return np.array(found)


@pytest.mark.parametrize(
    "compressed, full",
    [
        ([1, 0, 1, 0, 1, 1], [1, 1, 1, 0, 1, 0]),
        ([0.2, 0.9, 0.4, 0.0, 1.0, 0.7], [0.5, 0.8, 0.4, 0.3, 0.9, 1.0]),
    ],
)
def test_bootstrap_interval_is_that_of_all_resamples(compressed, full):
    found = retention(compressed, full, resamples=40_000, seed=1)
    every = all_resamples(compressed, full)
    low, high = np.quantile(every, [0.025, 0.975])
    assert found.value == pytest.approx(sum(compressed) / sum(full))
    # a Monte Carlo quantile lies between the exact quantiles a little further in and out
    assert np.quantile(every, 0.020) - 1e-9 <= found.low <= np.quantile(every, 0.030) + 1e-9
    assert np.quantile(every, 0.970) - 1e-9 <= found.high <= np.quantile(every, 0.980) + 1e-9
    assert low <= found.value <= high


def test_interval_is_paired():
    """Equal scores: retention is 1 in every resample, however scattered the scores are."""
    scores = np.random.default_rng(0).random(50).round()
    found = retention(scores, scores)
    assert (found.low, found.value, found.high) == (1.0, 1.0, 1.0)


def test_interval_covers_the_truth_about_as_often_as_it_says():
    rng, hits = np.random.default_rng(3), 0
    for k in range(200):
        full = rng.random(120) < 0.9
        kept = np.where(full, rng.random(120) < 0.8, rng.random(120) < 0.2)
        found = retention(kept, full, resamples=500, seed=k)
        hits += found.low <= (0.9 * 0.8 + 0.1 * 0.2) / 0.9 <= found.high
    assert 0.89 * 200 <= hits <= 0.99 * 200


def binomial_two_sided(wins: int, losses: int) -> float:
    """Probability of outcomes no likelier than the seen one, by listing all of them."""
    n = wins + losses
    seen = math.comb(n, wins)
    return sum(math.comb(n, k) for k in range(n + 1) if math.comb(n, k) <= seen) / 2**n


@pytest.mark.parametrize(
    ("right", "other", "bounded"),
    [
        ([1] * 20, [1] * 20, False),  # none differs: of 20 items, retention may be 95 % as well
        ([1] * 29, [1] * 29, False),
        ([1] * 30, [1] * 30, True),
        ([1] * 19 + [0], [1] * 20, True),
        ([0] * 20, [1] * 20, False),
    ],
)
def test_few_items_that_all_agree_give_no_interval(right, other, bounded):
    kept, gap = retention(right, other), difference(right, other)
    assert (kept.bounded, gap.bounded) == (bounded, bounded)
    assert ("(n < 30)" in str(kept)) == ("(n < 30)" in str(gap)) == (not bounded)
    if not bounded:
        assert str(gap) == f"{100 * (right[0] - 1):+.1f} (n < 30)"


@pytest.mark.parametrize("wins, losses", [(0, 0), (5, 0), (0, 7), (3, 4), (10, 2), (30, 55)])
def test_mcnemar_is_exact(wins, losses):
    first = [1] * wins + [0] * losses + [1, 0, 0]
    second = [0] * wins + [1] * losses + [1, 0, 0]
    found = mcnemar(first, second)
    assert (found.wins, found.losses) == (wins, losses)
    assert found.p == pytest.approx(binomial_two_sided(wins, losses))


@pytest.mark.parametrize("first, second", [([], []), ([1], [1, 0]), ([1, math.nan], [1, 0])])
def test_unpaired_or_missing_scores_are_refused(first, second):
    for statistic in (mcnemar, retention):
        with pytest.raises(OptionError, match="items"):
            statistic(first, second)


@pytest.mark.parametrize("how", [{"resamples": 0}, {"resamples": -1}])
def test_intervals_that_cannot_be_drawn_are_refused(how):
    with pytest.raises(OptionError, match=next(iter(how))):
        retention([1, 0], [1, 1], **how)


def test_no_right_answer_of_the_full_model():
    assert math.isnan(retention([0, 0], [0, 0]).value)
