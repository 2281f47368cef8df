"""Reducers of the vision tower against plain loops."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from support import matrix, tower
from support.families import FAMILIES, text
from support.max_min import k_center, naive_steps, rms
from torch import Tensor
from transformers import Qwen2VLVideoProcessor

import tokencomp
from tokencomp import Plan, Tokens, TowerStage, make_reducer
from tokencomp.adapters.registry import adapter_for
from tokencomp.adapters.towers.base import TowerCall


def span(
    x: Tensor, grid: tuple[int, int, int], pixels: tuple[int, int, int] | None = None
) -> Tokens:
    return Tokens(x, [grid], [1], modalities=["video" if grid[0] > 1 else "image"], pixels=pixels)


def naive_descriptor(
    x: Tensor, grid: tuple[int, int, int], pool: int, std_weight: float, temporal_weight: float
) -> Tensor:
    """What k-center compares, one square at a time: cells (n, patches, 3, frames, side, side)."""
    _, patches, channels, frames, side, _ = x.shape
    rows = []
    for number, cell in enumerate(x):
        means = torch.zeros(patches, channels, frames, side // pool, side // pool)
        deviations = torch.zeros_like(means)
        for at in itertools.product(*map(range, means.shape)):
            top, left = at[3] * pool, at[4] * pool
            square = cell[at[:3]][top : top + pool, left : left + pool]
            means[at] = square.mean()
            deviations[at] = square.std(correction=0)
        steps = [rms(means[:, :, i], means[:, :, i + 1]) ** 2 for i in range(frames - 1)]
        moved = math.sqrt(sum(steps) / max(1, len(steps)))
        angle = number // (grid[1] * grid[2]) * math.pi * (3 - math.sqrt(5))
        place = [temporal_weight * moved * f(angle) / math.sqrt(2) for f in (math.cos, math.sin)]
        columns = torch.cat([means.flatten(), std_weight * deviations.flatten()])
        rows.append(torch.cat([columns / math.sqrt(means.numel()), torch.tensor(place)]))
    return torch.stack(rows)


@pytest.mark.parametrize(
    ("pool", "std_weight", "temporal_weight", "frames"),
    [(1, 0.0, 0.0, 2), (2, 1.0, 0.0, 1), (4, 2.0, 1.0, 3), (1, 2.0, 1.5, 2)],
)
def test_kcenter_compares_averages_contrast_and_change(
    pool: int, std_weight: float, temporal_weight: float, frames: int
) -> None:
    """Twelve cells of two patches with three channels of 4×4 pixels each, in three steps."""
    torch.manual_seed(1)
    x, grid = torch.randn(12, 2, 3, frames, 4, 4), (3, 2, 2)
    x[:, :, :, 1:] = x[:, :, :, :1] + torch.rand(12, 1, 1, 1, 1, 1) * x[:, :, :, 1:]
    reducer = make_reducer(
        "kcenter", pool=pool, std_weight=std_weight, temporal_weight=temporal_weight
    )
    kept = matrix.kept(reducer, span(x.flatten(1), grid, (frames, 4, 4)), 5).patches
    assert kept.tolist() == k_center(
        naive_descriptor(x, grid, pool, std_weight, temporal_weight), 5
    )


def test_letters_stand_out_from_a_surface_of_their_mean_colour() -> None:
    """Of 12 cells in slightly different greys, two have strokes that average to such a grey."""
    grey = torch.linspace(-0.3, 0.3, 12)[:, None, None, None].repeat(1, 3, 4, 4)
    strokes = torch.tensor([-0.9, 0.9]).repeat(2)
    grey[4] += strokes
    grey[7] += strokes[:, None]
    seen = span(grey.flatten(1), (1, 3, 4), (1, 4, 4))
    averages = make_reducer("kcenter", std_weight=0)
    assert {4, 7}.isdisjoint(matrix.kept(averages, seen, 3).patches.tolist())
    assert matrix.kept(make_reducer("kcenter"), seen, 1).patches.tolist() in ([4], [7])


def test_a_thing_that_blinks_stays_in_every_step() -> None:
    """It shows in the second frame of three of five steps; all else differs from place to place."""
    torch.manual_seed(7)
    x = (0.1 * torch.randn(1, 4, 3, 1, 4, 4)).repeat(5, 1, 1, 2, 1, 1)
    for step in (0, 2, 3):
        x[step, 1, :, 1] = 1.0
    seen = span(x.flatten(0, 1).flatten(1), (5, 2, 2), (2, 4, 4))
    flashes = {1, 9, 13}
    assert flashes <= set(matrix.kept(make_reducer("kcenter"), seen, 4).patches.tolist())
    once = set(matrix.kept(make_reducer("kcenter", temporal_weight=0), seen, 4).patches.tolist())
    assert len(flashes & once) == 1


@pytest.mark.parametrize("weight", [0.5, 4.0])
@pytest.mark.parametrize("dropped", [(), (0, 5, 6, 17)])
def test_kcenter_compares_steps_of_features(weight: float, dropped: tuple[int, ...]) -> None:
    """Two videos and a picture in one call; an earlier stage may have dropped some cells."""
    torch.manual_seed(3)
    grids = [(4, 2, 3), (1, 2, 2), (5, 2, 2)]
    cells = [[c for c in range(math.prod(grid)) if c not in dropped] for grid in grids]
    x = torch.randn(sum(map(len, cells)), 8)
    tokens = Tokens(
        x, grids, [6, 2, 7], [*map(len, cells)], ["video", "image", "video"],
        torch.tensor([c for some in cells for c in some]) if dropped else None,
    )  # fmt: skip
    kept, first = matrix.reduced(make_reducer("kcenter", step_weight=weight), tokens).patches, 0
    for grid, left, budget in zip(grids, cells, tokens.budgets, strict=True):
        some = x[first : first + len(left)]
        expected = [first + i for i in k_center(naive_steps(some, grid, weight, left), budget)]
        assert [i for i in kept.tolist() if first <= i < first + len(left)] == expected
        first += len(left)


def test_equal_flashes_of_a_video_stay_in_every_step() -> None:
    """A feature turns up in three of six steps; the background differs from place to place."""
    torch.manual_seed(7)
    x = (0.1 * torch.randn(1, 4, 8)).repeat(6, 1, 1)
    x[[0, 2, 4], 1] = 1.0
    tokens, flashes = span(x.flatten(0, 1), (6, 2, 2)), {1, 9, 17}
    steps = make_reducer("kcenter", step_weight=4)
    assert flashes <= set(matrix.kept(steps, tokens, 6).patches.tolist())
    once = set(matrix.kept(make_reducer("kcenter"), tokens, 6).patches.tolist())
    assert len(flashes & once) == 1


def test_what_does_not_change_needs_no_second_step() -> None:
    """A still video: as many cells as it has places are those of one step's looks."""
    torch.manual_seed(8)
    x = torch.randn(1, 6, 3, 1, 4, 4).repeat(4, 1, 1, 2, 1, 1)
    seen = span(x.flatten(0, 1).flatten(1), (4, 2, 3), (2, 4, 4))
    kept = matrix.kept(make_reducer("kcenter"), seen, 6)
    assert sorted(int(i) % 6 for i in kept.patches) == list(range(6))


def test_patches_of_the_qwen_processor_hold_frames_side_by_side() -> None:
    """Where a cell's first frame is black and its second one white, the tower's cells say so."""
    family = FAMILIES["qwen2_vl"]
    adapter = adapter_for(tower.build(family))
    patch = adapter.tower_layout().patch_size
    processor = Qwen2VLVideoProcessor(
        patch_size=patch, merge_size=2, do_resize=False, do_normalize=False, do_sample_frames=False
    )
    clip = torch.zeros(4, 3, 4 * patch, 4 * patch, dtype=torch.uint8)
    clip[1::2] = 255
    made = processor(videos=[clip], return_tensors="pt")
    call = TowerCall(made["pixel_values_videos"], made["video_grid_thw"], "video")
    pixels = adapter.tower_layout().cells(call, TowerStage(0, 0.5, make_reducer("kcenter"))).pixels
    assert pixels.shape[1:3] == (3, 2)
    assert float(pixels[:, :, 0].amax()) == 0 and float(pixels[:, :, 1].amin()) == 1


def test_copies_leave_first() -> None:
    """A screen of 40 cells with 11 different ones: all of these are among any 11 or more."""
    torch.manual_seed(2)
    which = torch.cat([torch.arange(11), torch.randint(11, (29,))])[torch.randperm(40)]
    x = torch.randn(11, 48)[which]
    seen = span(x, (1, 5, 8), (1, 4, 4))
    for keep in (11, 20, 39):
        kept = matrix.kept(make_reducer("kcenter", pool=1), seen, keep).patches
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


@pytest.mark.parametrize("keep", [6, 8])
def test_runlength_keeps_what_changed(keep: int) -> None:
    """Some threshold explains what stays behind the first frame; the rest fills the budget."""
    torch.manual_seed(3)
    places, frames = 6, torch.randn(1, 6, 8).repeat(5, 1, 1)
    frames[2:, 1] += 3.0  # an object appears, and stays
    frames[3, 4] -= 2.0  # a flash
    frames += 0.01 * torch.arange(5)[:, None, None]  # it becomes brighter, slowly
    reducer = make_reducer("runlength")
    kept = matrix.kept(reducer, span(frames.flatten(0, 1), (5, 2, 3)), keep).patches
    first, later, left = kept[kept < places], kept[kept >= places], keep // 2
    assert first.tolist() == k_center(frames[0], left) and len(later) == left
    own = {(int(i) // places, int(i) % places) for i in later}
    # Only at the distance of two frames of a place can another threshold make a difference.
    pairs = itertools.combinations(frames, 2)
    thresholds = [0.0, *(float(rms(*two)) for a, b in pairs for two in zip(a, b, strict=True))]
    sizes = [set(changed(frames, threshold)) for threshold in thresholds]
    best = max((s for s in sizes if len(s) <= left), key=len)
    assert best <= own and {(2, 1), (3, 4), (4, 4)} <= own


def test_a_small_budget_is_not_all_first_frame() -> None:
    torch.manual_seed(4)
    frames = torch.randn(4, 9, 5)
    kept = matrix.kept(make_reducer("runlength"), span(frames.flatten(0, 1), (4, 3, 3)), 9).patches
    assert int((kept < 9).sum()) == 4


@pytest.mark.parametrize(
    ("name", "options"),
    [("divprune", {}), ("condiv", {"power": 0.0}), ("kcenter", {}), ("uniform", {})],
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
    expected = matrix.kept(reducer, span(means, (1, 4, 4)), 7).patches.tolist()
    with tokencomp.patch(model, plan=Plan((), TowerStage(1, 7 / 16, reducer))) as handle:
        with torch.no_grad():
            assert model(**inputs).logits.isfinite().all()
        assert handle.stats.tower_kept(0) == [expected]


def test_cells_at_an_edge_have_the_mean_of_fewer_patches() -> None:
    """VILA: 4 × 4 cells of 2 × 2 patches on 7 × 7 patches, column by column; then a separator."""
    family = tower.deep(FAMILIES["vila"])
    model = tower.build(family)
    inputs = tower.like(model, family.batch([[text(3), family.image(0), text(4)]]))
    with torch.no_grad(), tower.block_inputs(model, 1) as states:
        model(**inputs)
    grid = states[0].view(7, 7, -1).float()
    corners = itertools.product(range(0, 7, 2), repeat=2)
    means = torch.stack([grid[y : y + 2, x : x + 2].mean((0, 1)) for x, y in corners])
    reducer = make_reducer("kcenter")
    expected = matrix.kept(reducer, span(means, (1, 4, 4)), 7).patches.tolist()
    plan = Plan((), TowerStage(1, 7 / 16, reducer))
    with torch.no_grad(), tokencomp.patch(model, plan=plan) as handle:
        model(**inputs)
        assert handle.stats.tower_kept(0) == [[*expected, 16]]
