"""timechat against plain loops, and the frames that the engine remembers for it."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from support import matrix
from support.families import FAMILIES, text
from torch import Tensor

import tokencomp
from tokencomp import Plan, Stage, Tokens, make_reducer
from tokencomp.engine.choose import compared_frames
from tokencomp.engine.rowmap import RowMap
from tokencomp.errors import PlanError
from tokencomp.tokens.spans import Grid, VisualSpan


def tokens(grid: Grid, frame: Tensor | None) -> Tokens:
    t, h, w = grid
    features = torch.randn(t * h * w, 6)
    return Tokens(features, [grid], [1], modalities=["video"], frames=[frame])


def by_loops(given: Tokens, keep: int) -> list[int]:
    """The tokens that differ most from the same place of the frame before."""
    (frame,) = given.frames
    before = torch.cat([frame, given.features])

    def likeness(i: int) -> float:
        return float(torch.nn.functional.cosine_similarity(given.features[i], before[i], 0))

    order = sorted(range(given.lengths[0]), key=lambda i: (likeness(i), i))
    return sorted(order[:keep])


@pytest.mark.parametrize("grid", [(1, 3, 4), (3, 2, 3)])
@pytest.mark.parametrize("keep", [1, 5, 9])
def test_least_similar_tokens_stay(grid: Grid, keep: int) -> None:
    given = tokens(grid, torch.randn(grid[1] * grid[2], 6))
    kept = matrix.kept(make_reducer("timechat"), given, keep).rows.tolist()
    assert kept == by_loops(given, keep)


@pytest.mark.parametrize("keep", [2, 7, 12])
def test_without_a_frame_before_it_is_evs(keep: int) -> None:
    given = tokens((3, 2, 3), None)
    expected = matrix.kept(make_reducer("evs"), given, keep).rows
    assert torch.equal(matrix.kept(make_reducer("timechat"), given, keep).rows, expected)


def span(start: int, grid: Grid, item: int, **more: object) -> VisualSpan:
    n = grid[0] * grid[1] * grid[2] + len(more.get("special", ()))  # type: ignore[arg-type]
    return VisualSpan(start, n, grid, "video", item=item, **more)  # type: ignore[arg-type]


def test_frames_are_those_of_the_same_shape_before() -> None:
    """In a call, over calls, and apart from copies and other batches."""
    cache, x = SimpleNamespace(), torch.arange(40.0)[None, :, None]
    spans = [span(1, (2, 2, 2), 0), span(12, (1, 1, 3), 1), span(20, (2, 2, 2), 2, special=(4,))]
    first = compared_frames(x, RowMap.of_prompt(40, [40], [spans], []), cache)[0]
    assert first[:2] == [None, None]
    assert first[2][:, 0].tolist() == [5, 6, 7, 8]
    other = copy.deepcopy(cache)
    later = compared_frames(x + 100, RowMap.of_prompt(40, [40], [spans[:2]], []), cache)[0]
    assert later[0][:, 0].tolist() == [25, 26, 27, 28]
    assert later[1][:, 0].tolist() == [12, 13, 14]
    again = compared_frames(x, RowMap.of_prompt(40, [40], [spans[:1]], []), other)[0]
    assert again[0][:, 0].tolist() == [25, 26, 27, 28]
    two = compared_frames(
        x.expand(2, -1, -1), RowMap.of_prompt(40, [40, 40], [spans[:1]] * 2, []), cache
    )
    assert two == [[None], [None]]
    assert compared_frames(x, RowMap.of_prompt(40, [40], [spans[:1]], []), None) == [[None]]


def test_tiles_are_compared_with_the_same_tile() -> None:
    cache, x = SimpleNamespace(), torch.arange(20.0)[None, :, None]
    tiles = [span(0, (1, 1, 3), 0), span(5, (1, 1, 3), 0)]
    compared_frames(x, RowMap.of_prompt(20, [20], [tiles], []), cache)
    found = compared_frames(x, RowMap.of_prompt(20, [20], [tiles], []), cache)[0]
    assert [frame[:, 0].tolist() for frame in found] == [[0, 1, 2], [5, 6, 7]]


def test_a_still_scene_keeps_what_changed() -> None:
    """The second image differs from the first in two places, which stay at the smallest budget."""
    family = FAMILIES["qwen2_vl"]
    model, image = family.build(), family.image(1)
    changed = copy.deepcopy(image)
    changed.inputs["pixel_values"][8:16] += 3  # patches of tokens 2 and 3
    with tokencomp.patch(model, budget=2, reducer="timechat") as handle, torch.no_grad():
        model(**family.batch([[text(3), image, text(2), changed, text(2)]]))
        kept = handle.stats.kept(0)[-1][1]
    assert kept == [2, 3]


def test_it_acts_at_entry_alone() -> None:
    with pytest.raises(PlanError, match="reads what stands before the first layer"):
        Plan((Stage(2, 0.5, make_reducer("timechat")),))
