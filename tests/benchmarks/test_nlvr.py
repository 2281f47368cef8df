"""Intervals about NLVR draw sentences with all their examples."""

import numpy as np

from benchmarks.nlvr.page import RESAMPLES, Draws


def test_an_interval_draws_whole_sentences() -> None:
    rng = np.random.default_rng(5)
    sentences = rng.permutation([0] * 3 + [1] * 6 + [2] * 1 + [3] * 4 + [4] * 2)
    values = rng.normal(size=len(sentences))
    mean, low, high = Draws([*sentences]).interval(values)
    means = []
    for drawn in np.random.default_rng(0).integers(5, size=(RESAMPLES, 5)):
        means.append(np.mean([v for k in drawn for v in values[sentences == k]]))
    assert mean == np.mean(values)
    np.testing.assert_allclose([low, high], np.percentile(means, [2.5, 97.5]), rtol=1e-9)
