"""The training-free reducer against plain loops."""

from __future__ import annotations

import pytest
import torch

from tokencomp import VisualTokens, make_reducer


def tokens(
    grid: tuple[int, int, int], special: tuple[int, ...] = (), index: list[int] | None = None
) -> VisualTokens:
    n = grid[0] * grid[1] * grid[2] + len(special)
    mask = torch.zeros(n, dtype=torch.bool)
    mask[list(special)] = True
    if index is not None:
        mask = mask[index]
    return VisualTokens(
        features=torch.zeros(len(mask), 4),
        grid=grid,
        special=mask,
        index=None if index is None else torch.tensor(index),
        modality="video",
    )


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
        got = make_reducer("adsc").reduce(tokens(grid), keep)
        assert got.keep.tolist() == expected


def test_later_stages_count_live_tokens_and_keep_special_ones() -> None:
    grid, special = (2, 2, 4), (4, 9, 17)
    live = [0, 2, 3, 4, 5, 7, 9, 10, 12, 14, 15, 17]  # specials stay, some patches are gone
    frames = [[o for o in live if o not in special and (o < 9) is first] for first in (True, False)]
    for keep in range(4, 12):
        expected = set(special)
        for mine, quota in zip(
            frames, loop_quotas(keep - 3, [len(f) for f in frames]), strict=True
        ):
            expected |= set(loop_windows(mine, quota))
        got = make_reducer("adsc").reduce(tokens(grid, special, live), keep)
        assert {live[i] for i in got.keep.tolist()} == expected


def test_natural_plan_is_the_published_mean() -> None:
    """Windows of two after layers 4, 11 and 16 of 32: about 192 of 576 tokens per layer."""
    natural = (4 + 7 / 2 + 5 / 4 + 16 / 8) / 32
    plan = make_reducer("adsc").plan(1 - natural, 32)
    assert [s.layer for s in plan.stages] == [4, 11, 16]
    assert [s.fraction for s in plan.stages] == pytest.approx([1 / 2, 1 / 4, 1 / 8], abs=1e-6)
    assert natural * 576 == pytest.approx(192, abs=2)
