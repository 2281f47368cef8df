"""Progressive pooling against plain loops over cells."""

from __future__ import annotations

import math

import matrix
import pytest
import torch

from tokencomp import make_reducer
from tokencomp.reducers.pool import line_widths


def span(i: int, parts: int, size: int) -> range:
    """Places of area-pooling cell i."""
    return range(math.floor(i * size / parts), math.ceil((i + 1) * size / parts))


def half_up(values: range) -> int:
    return math.floor(sum(values) / len(values) + 0.5)


@pytest.mark.parametrize("keep", [1, 2, 4, 6, 7, 12, 13, 16, 31])
@pytest.mark.parametrize("special", [0, 2])
def test_image(keep: int, special: int) -> None:
    """Every token is the mean of its cell and stands at the cell's rounded mean place."""
    h, w = 6, 8
    given = matrix.tokens((1, h, w), special)
    got = make_reducer("pool").reduce(given, keep + special)
    places = [i for i in range(len(given)) if not given.special[i]]
    x = given.features[places].view(h, w, -1)
    widths = line_widths(keep, h, w)
    at = []
    for i, n in enumerate(widths):
        rows = span(i, len(widths), h)
        for j in range(n):
            columns = span(j, n, w)
            at.append(places[half_up(rows) * w + half_up(columns)])
            cell = torch.stack([x[r, c] for r in rows for c in columns]).mean(0)
            mine = got.keep.tolist().index(at[-1])
            assert (got.merged[mine] - cell).abs().max() < 1e-5
    patches = [k for k in got.keep.tolist() if not given.special[k]]
    assert patches == at == sorted(set(at))


@pytest.mark.parametrize("tokens", range(1, 49))
def test_lines(tokens: int) -> None:
    widths = line_widths(tokens, 6, 8)
    assert sum(widths) == tokens
    assert max(widths) - min(widths) <= 1
    assert len(widths) <= 6 and max(widths) <= 8
    if tokens in (12, 48):  # an even grid of the frame's own shape exists
        assert widths == {12: [4] * 3, 48: [8] * 6}[tokens]


@pytest.mark.parametrize("frames", [1, 2, 3, 7, 8, 16, 33])
@pytest.mark.parametrize("group", [0, 1, 3])
def test_frame_quota(frames: int, group: int) -> None:
    """Exact sums; first frames of a group get no less than others, and whole frames if they can."""
    reducer = make_reducer("pool", group=group)
    for budget in range(1, frames * 16, 5):
        quota = reducer.frame_quota(frames, 16, budget)
        assert sum(quota) == budget and all(0 <= q <= 16 for q in quota)
        if group == 3 and frames > 3:
            fine, coarse = quota[::3], [q for f, q in enumerate(quota) if f % 3]
            assert min(fine) >= max(coarse) - 1
            if budget >= 16 * len(fine) + 4 * len(coarse):
                assert set(fine) == {16}


def test_published_shape() -> None:
    """Groups of four: one whole frame, three of half the side."""
    quota = make_reducer("pool").frame_quota(8, 196, 2 * (196 + 3 * 49))
    assert quota == [196, 49, 49, 49] * 2


def test_video_frames_do_not_mix() -> None:
    given = matrix.tokens((4, 4, 4))
    given.features = torch.arange(4).repeat_interleave(16)[:, None].expand(64, 12).float()
    got = make_reducer("pool").reduce(given, 28)
    assert torch.equal(got.merged[:, 0], (got.keep // 16).float())
    assert got.sizes.sum() == pytest.approx(64)


def test_whole_frames_stay_to_the_bit() -> None:
    given = matrix.tokens((4, 4, 4))
    got = make_reducer("pool", group=4).reduce(given, 28)
    assert got.keep[:16].tolist() == list(range(16))
    assert torch.equal(got.merged[:16], given.features[:16])
