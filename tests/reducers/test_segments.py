"""Steps that methods for video share, clusters and segments, against plain loops."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from support import matrix
from support.tower_loops import cosine, mean, peaks

from tokencomp.reducers import _clusters, _segments
from tokencomp.reducers._clusters import density_peaks
from tokencomp.reducers._segments import segments, static_segments


@pytest.mark.parametrize("entries", [1 << 23, 2 * 24**2])
@pytest.mark.parametrize("itself", [True, False])
def test_density_peaks(itself: bool, entries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sets of many sizes, together and in portions, each as it would be alone."""
    monkeypatch.setattr(_clusters, "ENTRIES", entries)
    lengths, clusters = [24, 9, 1, 24, 70, 2, 24, 9], [8, 9, 1, 1, 11, 1, 24, 3]
    neighbours = [4, 4, 4, 2, 5, 4, 4, 30]
    x = torch.randn(sum(lengths), 5, generator=torch.Generator().manual_seed(1))
    scale = 5**0.5 if itself else 1.0
    centres, labels = density_peaks(x, lengths, clusters, neighbours, scale, itself)
    want: tuple[list[int], list[int]] = [], []
    for rows, count, k in zip(x.split(lengths), clusters, neighbours, strict=True):
        own = peaks(rows.double().tolist(), count, k, not itself)
        first, number = len(want[1]), len(want[0])
        want[0].extend(first + centre for centre in own[0])
        want[1].extend(number + label for label in own[1])
    assert (centres.tolist(), labels.tolist()) == want


def test_density_peaks_of_copies() -> None:
    """No noise: of equal rows the lower ones are centres, each of a cluster of its own."""
    centres, labels = density_peaks(torch.ones(9, 3), [3, 6], [1, 2], [4, 4])
    assert centres.tolist() == [0, 3, 4] and labels.tolist() == [0, 0, 0, 1, 2, 1, 1, 1, 1]


@pytest.mark.parametrize(("least", "threshold"), [(1, 0.2), (5, -1.0), (5, 0.2), (40, 0.9)])
def test_segments_are_cut_where_frames_differ(least: int, threshold: float) -> None:
    """Every cosine below the threshold, then the lowest others one by one."""
    like = torch.rand(8, generator=torch.Generator().manual_seed(2)).numpy() * 2 - 1
    cuts = {i for i, c in enumerate(like) if c < threshold}
    while len(cuts) + 1 < min(least, 9):
        cuts.add(min((i for i in range(8) if i not in cuts), key=lambda i: like[i]))
    ends = [0, *(c + 1 for c in sorted(cuts)), 9]
    assert segments(like, threshold, least) == [b - a for a, b in itertools.pairwise(ends)]


@pytest.mark.parametrize("name", ["frame_cosines", "place_cosines"])
def test_cosines_of_frames_and_places(name: str) -> None:
    """Of spans of several sizes."""
    spans = [matrix.tokens(grid) for grid in [(4, 2, 3), (1, 2, 2), (3, 5, 4)]]
    tokens = matrix.joined(spans)
    got = getattr(_segments, name)(tokens, tokens.features)
    for span, own in zip(spans, got, strict=True):
        t = span.grids[0][0]
        frames = span.features.double().view(t, -1, matrix.DIM).tolist()
        steps = itertools.pairwise(frames)
        if name == "frame_cosines":
            want = [cosine(mean(a), mean(b)) for a, b in steps]
        else:
            want = [[cosine(p, q) for p, q in zip(a, b, strict=True)] for a, b in steps]
        assert len(own) == t - 1
        np.testing.assert_allclose(own, np.array(want).reshape(own.shape), atol=1e-6)


@pytest.mark.parametrize("seed", range(3))
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
