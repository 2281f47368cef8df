"""Reducers of the vision tower against plain loops."""

from __future__ import annotations

import itertools

import pytest
import torch
from support import tower
from support.families import FAMILIES, text
from torch import Tensor

import tokencomp
from tokencomp import Plan, TowerStage, VisualTokens, make_reducer


def span(
    x: Tensor, grid: tuple[int, int, int], pixels: tuple[int, int] | None = None
) -> VisualTokens:
    special = torch.zeros(len(x), dtype=torch.bool)
    return VisualTokens(x, grid, special, kind="video" if grid[0] > 1 else "image", pixels=pixels)


def rms(a: Tensor, b: Tensor) -> float:
    return float((a - b).square().mean().sqrt())


def greedy(x: Tensor, keep: int) -> list[int]:
    """k-centre, one distance at a time."""
    centre = x.mean(0)
    chosen = [max(range(len(x)), key=lambda i: (rms(x[i], centre), -i))]
    while len(chosen) < keep:
        rest = [i for i in range(len(x)) if i not in chosen]
        chosen.append(max(rest, key=lambda i: (min(rms(x[i], x[j]) for j in chosen), -i)))
    return sorted(chosen)


@pytest.mark.parametrize("thumb", [1, 2, 4])
def test_kcentre_compares_thumbnails(thumb: int) -> None:
    """Cells of two patches with three channels of 4×4 pixels each."""
    torch.manual_seed(1)
    x = torch.randn(12, 2 * 3 * 16)
    small = x.view(12, 6, 4 // thumb, thumb, 4 // thumb, thumb).mean((3, 5)).flatten(1)
    kept = make_reducer("kcentre", thumb=thumb).reduce(span(x, (1, 3, 4), (4, 4)), 5).keep
    assert kept.tolist() == greedy(small, 5)


def test_copies_leave_first() -> None:
    """A screen of 40 cells with 11 different ones: all of these are among any 11 or more."""
    torch.manual_seed(2)
    which = torch.cat([torch.arange(11), torch.randint(11, (29,))])[torch.randperm(40)]
    x = torch.randn(11, 48)[which]
    for keep in (11, 20, 39):
        kept = make_reducer("kcentre", thumb=1).reduce(span(x, (1, 5, 8), (4, 4)), keep).keep
        assert len(kept) == keep and set(which[kept].tolist()) == set(range(11))


def changed(frames: Tensor, threshold: float) -> list[tuple[int, int]]:
    """(frame, place) of every token that differs from the last kept one by more."""
    last, result = list(frames[0]), []
    for t, frame in enumerate(frames[1:], start=1):
        for place, token in enumerate(frame):
            if rms(token, last[place]) > threshold:
                last[place] = token
                result.append((t, place))
    return result


def test_runlength_keeps_what_changed() -> None:
    """Some threshold explains what stays behind the first frame; the rest fills the budget."""
    torch.manual_seed(3)
    places, frames = 6, torch.randn(1, 6, 8).repeat(5, 1, 1)
    frames[2:, 1] += 3.0  # an object appears, and stays
    frames[3, 4] -= 2.0  # a flash
    frames += 0.01 * torch.arange(5)[:, None, None]  # it becomes brighter, slowly
    reducer = make_reducer("runlength", first=0.5)
    kept = reducer.reduce(span(frames.flatten(0, 1), (5, 2, 3)), 8).keep
    first, later = kept[kept < places], kept[kept >= places]
    assert first.tolist() == greedy(frames[0], 4) and len(later) == 4
    own = {(int(i) // places, int(i) % places) for i in later}
    # Only at the distance of two frames of a place can another threshold make a difference.
    pairs = itertools.combinations(frames, 2)
    thresholds = [0.0, *(float(rms(*two)) for a, b in pairs for two in zip(a, b, strict=True))]
    sizes = [set(changed(frames, threshold)) for threshold in thresholds]
    best = max((s for s in sizes if len(s) <= 4), key=len)
    assert best <= own and {(2, 1), (3, 4), (4, 4)} <= own


@pytest.mark.parametrize("by", ["thumbnails", "even"])
def test_keyframes_of_features(by: str) -> None:
    """Frames by their means, then tokens of these frames, both by k-centre."""
    torch.manual_seed(6)
    frames = torch.randn(7, 6, 5) + 2 * torch.randn(7, 1, 5)
    kept = make_reducer("keyframes", by=by, slack=1.5).reduce(
        span(frames.flatten(0, 1), (7, 2, 3)), 11
    )
    chosen = greedy(frames.mean(1), 3) if by == "thumbnails" else [1, 3, 5]
    tokens = greedy(frames[chosen].flatten(0, 1), 11)
    assert kept.keep.tolist() == [chosen[i // 6] * 6 + i % 6 for i in tokens]


def test_a_small_budget_is_not_all_first_frame() -> None:
    torch.manual_seed(4)
    frames = torch.randn(4, 9, 5)
    kept = make_reducer("runlength").reduce(span(frames.flatten(0, 1), (4, 3, 3)), 9).keep
    assert int((kept < 9).sum()) == 4


@pytest.mark.parametrize(
    ("name", "options"),
    [("divprune", {}), ("condiv", {"signal": "none"}), ("kcentre", {}), ("uniform", {})],
)
def test_reducers_at_later_blocks_see_mean_hidden_states(name: str, options: dict) -> None:
    """Any reducer that reads the picture alone chooses cells before block 1 of the tower."""
    family = tower.deep(FAMILIES["qwen2_vl"])
    model = tower.build(family)
    inputs = tower.like(model, family.batch([[text(3), family.image(0), text(4)]]))
    with torch.no_grad(), tower.block_inputs(model, 1) as states:
        model(**inputs)
    means = states[0].view(16, 4, -1).mean(1).float()  # four neighbouring patches are one token
    reducer = make_reducer(name, **options)
    expected = reducer.reduce(span(means, (1, 4, 4)), 7).keep.tolist()
    with tokencomp.patch(model, plan=Plan((), TowerStage(1, 7 / 16, reducer))) as handle:
        with torch.no_grad():
            assert model(**inputs).logits.isfinite().all()
        assert handle.stats.tower_kept(0) == [expected]
