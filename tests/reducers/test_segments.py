"""Steps that methods for video share, clusters and segments, against plain loops."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from support.tower_loops import cosine, peaks

from tokencomp.reducers._clusters import distances, dpc_knn
from tokencomp.reducers._segments import segments, static_segments


@pytest.mark.parametrize("itself", [True, False])
@pytest.mark.parametrize("clusters", [1, 3, 8, 24])
def test_density_peaks(clusters: int, itself: bool) -> None:
    x = torch.randn(24, 5, generator=torch.Generator().manual_seed(1))
    scale = 5**0.5 if itself else 1.0
    centres, labels = dpc_knn(distances(x) / scale, clusters, 4, itself)
    assert (centres.tolist(), labels.tolist()) == peaks(
        x.double().tolist(), clusters, 4, not itself
    )


def test_density_peaks_of_copies() -> None:
    """No noise: of equal rows the lower ones are centres, each of a cluster of its own."""
    centres, labels = dpc_knn(distances(torch.ones(6, 3)), 2, 4)
    assert centres.tolist() == [0, 1] and labels.tolist() == [0, 1, 0, 0, 0, 0]


@pytest.mark.parametrize("least", [1, 3, 5, 40])
@pytest.mark.parametrize("threshold", [-1.0, 0.2, 0.9])
def test_segments_are_cut_where_frames_differ(least: int, threshold: float) -> None:
    """Every cosine below the threshold, then the lowest others one by one."""
    means = torch.randn(9, 4, generator=torch.Generator().manual_seed(2))
    rows = means.double().tolist()
    like = [cosine(a, b) for a, b in itertools.pairwise(rows)]
    cuts = {i for i, c in enumerate(like) if c < threshold}
    while len(cuts) + 1 < min(least, 9):
        cuts.add(min((i for i in range(8) if i not in cuts), key=lambda i: like[i]))
    ends = [0, *(c + 1 for c in sorted(cuts)), 9]
    assert segments(means, threshold, least) == [b - a for a, b in itertools.pairwise(ends)]


@pytest.mark.parametrize("seed", range(6))
def test_static_segments_save_most(seed: int) -> None:
    """Against all ways to cut eight frames."""
    static = np.random.default_rng(seed).random((7, 5)) < 0.7

    def saved(lengths: list[int]) -> int:
        total = first = 0
        for length in lengths:
            total += (length - 1) * int(static[first : first + length - 1].all(0).sum())
            first += length
        return total

    ways = []
    for cuts in itertools.product([False, True], repeat=7):
        ends = [0, *(i + 1 for i, cut in enumerate(cuts) if cut), 8]
        ways.append([b - a for a, b in itertools.pairwise(ends)])
    got = static_segments(static)
    assert got in ways and saved(got) == max(map(saved, ways))
    assert static_segments(np.zeros((7, 5), dtype=bool)) == [1] * 8
    assert static_segments(np.zeros((0, 5), dtype=bool)) == [1]
