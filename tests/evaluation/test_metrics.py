"""Statistics against brute force; `test_score_interval.py` has the intervals."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tokencomp.errors import OptionError
from tokencomp.evaluation import mcnemar, retention
from tokencomp.evaluation.metrics import difference


def test_interval_is_paired():
    """One other answer in 50 says more of 50 equal items than of 25 that differ either way."""
    scores = np.random.default_rng(0).random(50).round()
    other = scores.copy()
    other[scores.argmax()] = 0
    near, far = difference(other, scores), difference(1 - scores, scores)
    assert near.high - near.low < 0.2 < 0.5 < far.high - far.low


def binomial_two_sided(wins: int, losses: int) -> float:
    """Probability of outcomes no likelier than the seen one, by listing all of them."""
    n = wins + losses
    seen = math.comb(n, wins)
    return sum(math.comb(n, k) for k in range(n + 1) if math.comb(n, k) <= seen) / 2**n


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
