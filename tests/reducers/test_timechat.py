"""Methods for videos: timechat, clusters and segments, against plain loops."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support import matrix
from support.families import FAMILIES, text
from support.tower_loops import cosine, mean, peaks
from torch import Tensor

import tokencomp
from tokencomp import Plan, Stage, Tokens, make_reducer
from tokencomp.engine.frames import frames_before
from tokencomp.engine.memory import Memory
from tokencomp.engine.rowmap import RowMap
from tokencomp.errors import PlanError
from tokencomp.reducers import ScoreReducer, _clusters, _segments
from tokencomp.reducers._clusters import density_peaks
from tokencomp.reducers._segments import segments, static_segments
from tokencomp.tokens.signals import FRAMES
from tokencomp.tokens.tokens import Grid, VisualSpan


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
    kept = matrix.kept(make_reducer("timechat"), given, keep).patches.tolist()
    assert kept == by_loops(given, keep)


@pytest.mark.parametrize("keep", [2, 7, 12])
def test_without_a_frame_before_it_is_evs(keep: int) -> None:
    given = tokens((3, 2, 3), None)
    expected = matrix.kept(make_reducer("evs"), given, keep).patches
    assert torch.equal(matrix.kept(make_reducer("timechat"), given, keep).patches, expected)


def span(start: int, grid: Grid, item: int, **more: object) -> VisualSpan:
    n = grid[0] * grid[1] * grid[2] + len(more.get("special", ()))  # type: ignore[arg-type]
    return VisualSpan(start, n, grid, "video", item=item, **more)  # type: ignore[arg-type]


def call(spans: list[list[VisualSpan]], memory: Memory, columns: int = 40) -> Any:
    """A call with these spans on a cache with this memory."""
    row_map = RowMap.of_prompt(columns, [columns] * len(spans), spans)
    modalities = {span.modality for row in spans for span in row}
    return SimpleNamespace(
        map=row_map, memory=memory, entered=[], compared=set(), modalities=modalities
    )


def after(this: Any) -> Memory:
    """The memory after a call whose cache holds all of its columns."""
    rows = torch.arange(this.map.rows).expand(len(this.map.spans), -1)
    return this.memory.append(this.entered, rows, this.map.rows)


def test_frames_are_those_of_the_same_shape_before() -> None:
    """In a call, over calls, and not in another batch."""
    x = torch.arange(40.0)[None, :, None]
    spans = [span(1, (2, 2, 2), 0), span(12, (1, 1, 3), 1), span(20, (2, 2, 2), 2, special=(4,))]
    one = call([spans], Memory())
    first = frames_before(one, x)[0]
    assert first[:2] == [None, None]
    assert first[2][:, 0].tolist() == [5, 6, 7, 8]
    later = frames_before(call([spans[:2]], after(one)), x + 100)[0]
    assert later[0][:, 0].tolist() == [25, 26, 27, 28]
    assert later[1][:, 0].tolist() == [12, 13, 14]
    two = call([spans[:1], spans[:1]], after(one))
    assert frames_before(two, x.expand(2, -1, -1)) == [[None], [None]]


def test_tiles_are_compared_with_the_same_tile() -> None:
    x = torch.arange(20.0)[None, :, None]
    tiles = [span(0, (1, 1, 3), 0), span(5, (1, 1, 3), 0)]
    one = call([tiles], Memory(), 20)
    frames_before(one, x)
    found = frames_before(call([tiles], after(one), 20), x)[0]
    assert [frame[:, 0].tolist() for frame in found] == [[0, 1, 2], [5, 6, 7]]


def test_places_of_which_nothing_is_known_stay() -> None:
    """As where a session has evicted their rows."""
    frame = torch.randn(12, 6)
    given = tokens((1, 3, 4), frame)
    frame[[2, 9]] = torch.nan
    given.features[[0, 5]] = -frame[[0, 5]]  # nothing else differs more
    kept = matrix.kept(make_reducer("timechat"), given, 4).patches.tolist()
    assert kept == [0, 2, 5, 9]
    assert matrix.kept(make_reducer("timechat"), given, 2).patches.tolist() == [2, 9]


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


@dataclasses.dataclass(frozen=True)
class Spy(ScoreReducer):
    """Notes which spans have a frame before them."""

    name = "spy"
    needs = frozenset({FRAMES})
    seen: list[bool] = dataclasses.field(default_factory=list)

    def scores(self, tokens: Tokens) -> Tensor:
        assert tokens.frames is not None
        self.seen.extend(frame is not None for frame in tokens.frames)
        return tokens.features[:, 0]


@pytest.mark.parametrize("tower_ratio", [0.0, 0.3])
def test_frames_that_lost_patches_in_the_tower_are_not_compared(tower_ratio: float) -> None:
    """Their rows are not those of the places of a frame."""
    family, spy = FAMILIES["qwen2_vl"], Spy()
    model, image = family.build(), family.image(1)
    inputs = family.batch([[text(3), image, text(2), image, text(2)]])
    with tokencomp.patch(model, 0.5, reducer=spy, tower_ratio=tower_ratio), torch.no_grad():
        model(**inputs)
    assert spy.seen == [False, tower_ratio == 0]


def test_it_acts_at_entry_alone() -> None:
    with pytest.raises(PlanError, match="reads the input of the first layer"):
        Plan((Stage(2, 0.5, make_reducer("timechat")),))


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
