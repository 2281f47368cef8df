"""The training-free reducer against plain loops."""

from __future__ import annotations

import pytest
import torch

from tokencomp import Tokens, make_reducer


def kept(grid: tuple[int, int, int], keep: int, index: list[int] | None = None) -> list[int]:
    """Rows that are kept of the patches `index` of a video, by default of all."""
    n = grid[0] * grid[1] * grid[2] if index is None else len(index)
    tokens = Tokens(torch.zeros(n, 4), [grid], [keep], [n], ["video"])
    tokens.index = None if index is None else torch.tensor(index)
    return make_reducer("adsc").reduce(tokens).rows.tolist()


def loop_windows(live: list[int], quota: int) -> list[int]:
    kept = []
    for i in range(quota):
        window = live[i * len(live) // quota : (i + 1) * len(live) // quota]
        kept.append(window[-1])
    return kept


def loop_quotas(keep: int, counts: list[int]) -> list[int]:
    quotas, seen = [], 0
    for count in counts:
        before = keep * seen // sum(counts)
        seen += count
        quotas.append(keep * seen // sum(counts) - before)
    return quotas


@pytest.mark.parametrize("grid", [(1, 8, 8), (3, 3, 5), (7, 1, 1)])
def test_windows_match_a_plain_loop(grid: tuple[int, int, int]) -> None:
    t, h, w = grid
    for keep in range(1, t * h * w):
        quotas = loop_quotas(keep, [h * w] * t)
        expected: list[int] = []
        for frame, quota in enumerate(quotas):
            live = list(range(frame * h * w, (frame + 1) * h * w))
            expected += loop_windows(live, quota)
        assert kept(grid, keep) == expected


def test_later_stages_count_live_tokens() -> None:
    live = [0, 2, 3, 4, 6, 8, 10, 12, 13]  # some patches of both frames are gone
    frames = [[i for i in live if i < 8], [i for i in live if i >= 8]]
    for keep in range(1, 9):
        quotas = loop_quotas(keep, [len(f) for f in frames])
        parts = [loop_windows(own, quota) for own, quota in zip(frames, quotas, strict=True)]
        assert [live[i] for i in kept((2, 2, 4), keep, live)] == [*parts[0], *parts[1]]


def test_natural_plan_is_the_published_mean() -> None:
    """Windows of two after layers 4, 11 and 16 of 32: about 192 of 576 tokens per layer."""
    natural = (4 + 7 / 2 + 5 / 4 + 16 / 8) / 32
    plan = make_reducer("adsc").plan(1 - natural, 32)
    assert [s.layer for s in plan.stages] == [4, 11, 16]
    assert [s.fraction for s in plan.stages] == pytest.approx([1 / 2, 1 / 4, 1 / 8], abs=1e-6)
    assert natural * 576 == pytest.approx(192, abs=2)
