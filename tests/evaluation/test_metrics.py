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


@pytest.mark.parametrize("statistic", [retention, difference])
def test_the_seed_draws_the_resamples(statistic):
    rng = np.random.default_rng(0)
    first, second = rng.random(200), rng.random(200)
    found = [statistic(first, second, resamples=100, seed=seed) for seed in (1, 1, 2)]
    assert found[0].low == found[1].low != found[2].low


def test_interval_is_paired():
    """Equal scores but for one item: nearly all resamples have 49 of 50, however they scatter."""
    scores = np.random.default_rng(0).random(50).round()
    other = scores.copy()
    other[scores.argmax()] = 0
    found = difference(other, scores)
    assert (found.low, found.high) == pytest.approx((-0.06, 0.0))


def binomial_two_sided(wins: int, losses: int) -> float:
    """Probability of outcomes no likelier than the seen one, by listing all of them."""
    n = wins + losses
    seen = math.comb(n, wins)
    return sum(math.comb(n, k) for k in range(n + 1) if math.comb(n, k) <= seen) / 2**n


def exact_margin(n: int) -> float:
    """The largest share of other items of which n draws show none in one case of 40, by search."""
    shares = np.linspace(0, 1, 200_001)
    return float(shares[(1 - shares) ** n >= 0.025].max())


@pytest.mark.parametrize("n", [1, 20, 60, 1000])
def test_items_that_are_all_alike_have_the_exact_interval(n: int) -> None:
    margin = exact_margin(n)
    near = pytest.approx
    gap = difference([1] * n, [1] * n)
    assert (gap.value, gap.low, gap.high) == near((0, -margin, margin), abs=1e-5)
    kept = retention([1] * n, [1] * n)  # nothing is better than always right
    assert (kept.value, kept.low, kept.high) == near((1, 1 - margin, 1), abs=1e-5)
    lost, none = difference([0] * n, [1] * n), retention([0] * n, [1] * n)
    assert (lost.low, lost.high) == near((-1, margin - 1), abs=1e-5)
    assert (none.low, none.high) == near((0, margin), abs=1e-5)


def test_the_interval_of_equal_answers_is_wider_where_the_full_model_knows_less() -> None:
    """30 of 60 right, the same 30: 6 of 100 other items are 12 % of what the full model knows."""
    right = [1, 0] * 30
    kept, margin = retention(right, right), exact_margin(60)
    assert (kept.low, kept.high) == pytest.approx((1 - 2 * margin, 1 + 2 * margin), abs=1e-4)
    assert f"{retention([1] * 60, [1] * 60)}" == "100.0% [94.0%, 100.0%]"


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


def test_no_right_answer_of_the_full_model():
    assert math.isnan(retention([0, 0], [0, 0]).value)
