"""Progressive pooling against plain loops over cells."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from support import matrix
from support.families import FAMILIES

import tokencomp
from tokencomp import make_reducer
from tokencomp.reducers.pool import line_widths


def span(i: int, parts: int, size: int) -> range:
    """Places of area-pooling cell i."""
    return range(math.floor(i * size / parts), math.ceil((i + 1) * size / parts))


def half_up(values: range) -> int:
    return math.floor(sum(values) / len(values) + 0.5)


@pytest.mark.parametrize(
    ("position", "place"), [("mean", half_up), ("first", min), (None, half_up)]
)
def test_image(position: str | None, place: Callable[[range], int]) -> None:
    """Every token is the mean of its cell; it stands at its rounded mean place, or its first."""
    h, w = 6, 8
    given = matrix.tokens((1, h, w))
    x = given.features.view(h, w, -1)
    for keep in (1, 2, 4, 6, 7, 12, 13, 16, 31):
        got = matrix.kept(make_reducer("pool", position=position), given, keep)
        widths = line_widths(keep, h, w)
        at = []
        for i, n in enumerate(widths):
            rows = span(i, len(widths), h)
            for j in range(n):
                columns = span(j, n, w)
                at.append(place(rows) * w + place(columns))
                cell = torch.stack([x[r, c] for r in rows for c in columns]).mean(0)
                mine = got.patches.tolist().index(at[-1])
                assert (got.features[mine] - cell).abs().max() < 1e-5
        assert got.patches.tolist() == at == sorted(set(at))


def nearest(frames: int, budget: int, square: float) -> int:
    """The group whose whole first frames and coarser others come nearest to the budget."""
    sizes = {}
    for group in (2, 4, 8):
        firsts = len(range(0, frames, group))
        sizes[group] = abs(16 * (firsts + (frames - firsts) / square) - budget)
    return min(sizes, key=lambda group: (sizes[group], group))


def test_lines() -> None:
    for tokens in range(1, 49):
        widths = line_widths(tokens, 6, 8)
        assert sum(widths) == tokens
        assert max(widths) - min(widths) <= 1
        assert len(widths) <= 6 and max(widths) <= 8
        if tokens in (12, 48):  # an even grid of the frame's own shape exists
            assert widths == {12: [4] * 3, 48: [8] * 6}[tokens]


@pytest.mark.parametrize(("frames", "stride"), [(1, 2.0), (3, 1.5), (8, 2.0), (33, 3.0)])
def test_frame_quota(frames: int, stride: float) -> None:
    """Exact sums, even parts; first frames are whole as far as the stride of the others allows."""
    reducer, square = make_reducer("pool", stride=stride), stride**2
    for budget in range(1, frames * 16 + 1):
        quota, group = reducer.frame_quota(frames, 16, budget), nearest(frames, budget, square)
        fine, coarse = quota[::group], [q for f, q in enumerate(quota) if f % group]
        assert sum(quota) == budget and all(0 <= q <= 16 for q in quota)
        assert all(max(part) - min(part) <= 1 for part in (fine, coarse) if part)
        assert all(quota) or budget < frames
        if budget >= 16 * len(fine) + 16 * len(coarse) / square:
            assert set(fine) == {16}
        elif coarse and budget > frames:
            # half a token is lost by rounding the firsts' share, one token by spreading the others'
            assert sum(fine) / len(fine) <= square * (max(coarse) + 1)
            assert sum(fine) / len(fine) + 1 >= max(coarse)


def test_plain_pooling_and_the_last_frames_to_go() -> None:
    """Even shares without a stride; with one, first frames of groups stay longest."""
    for budget in range(1, 7 * 16 + 1):
        quota = make_reducer("pool", stride=1.0).frame_quota(7, 16, budget)
        assert sum(quota) == budget and max(quota) - min(quota) <= 1
    for budget in (1, 2, 5, 15):
        quota = make_reducer("pool").frame_quota(16, 64, budget)
        assert sum(quota[::8]) == min(budget, 2) and max(quota) == 1


def test_first_frames_stay_whole() -> None:
    """At the budgets of the figure, and groups of four: one whole frame, three of half the side."""
    for frames, fraction, group in ((16, 0.4375, 4), (16, 0.625, 2), (8, 0.4375, 4)):
        quota = make_reducer("pool").frame_quota(frames, 196, round(frames * 196 * fraction))
        assert quota == [196 if f % group == 0 else 49 for f in range(frames)]


@pytest.mark.parametrize("name", ["qwen2_vl", "llava_onevision"])
def test_positions_follow_the_model(name: str) -> None:
    family = FAMILIES[name]
    with tokencomp.patch(family.build(), 0.75, reducer="pool") as handle:
        assert handle.plan.stages[0].reducer.position == (None if family.mrope else "first")
        handle.set(position="mean")
        assert handle.plan.stages[0].reducer.position == "mean"


def test_video_frames_do_not_mix_and_whole_ones_stay_to_the_bit() -> None:
    given = matrix.tokens((4, 4, 4))
    frame = torch.arange(4).repeat_interleave(16)[:, None]
    given.features[:, :1] = frame.float()
    got = matrix.kept(make_reducer("pool"), given, 28)
    assert torch.equal(got.features[:, 0], (got.patches // 16).float())
    assert got.weights.sum() == pytest.approx(64)
    assert got.patches[:16].tolist() == list(range(16))
    assert torch.equal(got.features[:16], given.features[:16])
