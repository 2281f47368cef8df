"""How many device calls a reducer makes does not depend on how many spans a batch has."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support import matrix
from support.matrix import Case
from support.tower_loops import clip

from benchmarks.kernels.call_counter import Calls
from benchmarks.kernels.calls import measure, tiny_model
from tokencomp import VisualTokens, make_reducer
from tokencomp.plan.reducer import reduced
from tokencomp.reducers._batch import means

FEW, MANY = 2, 16  # prompts
MORE = 6
IMAGES = [(1, 2 + i % 2, 3 + i) for i in range(16)]
VIDEOS = [(2 + i // 3, 1 + i % 2, 2 + i % 3) for i in range(16)]
EXTREMES = (0, 5, 11, 15)
# These pool or project grids size by size, or compare copies, whose ties paddings would change.
PER_SIZE = {"anchorprune": 8, "ccam": 60, "flashvid": 90, "pool": 6, "vidcom2": 65}


def image(seed: int) -> VisualTokens:
    """An image of 4 × 5 tokens."""
    return matrix.tokens((1, 4, 5), seed=seed)


def video(seed: int) -> VisualTokens:
    """A clip of 9 frames, in which cuts, and places that stand still, differ from seed to seed."""
    tokens = clip((9, 2, 5), special=0)
    # What all frames share makes them alike, so that they merge along time.
    tokens.features += 1 + 0.1 * matrix.tokens((9, 2, 5), seed=seed).features
    return tokens


def calls(case: Case, spans: list[VisualTokens]) -> int:
    """aten calls for spans of which every two share a text of 4 or 5."""
    reducer, row = make_reducer(case[0], **case[1]), matrix.row(case[0])
    for number, (first, second) in enumerate(zip(spans[::2], spans[1::2], strict=True)):
        text = slice(4 + number % 2)
        first.query, first.query_scores = first.query[text], first.query_scores[text]
        second.query, second.query_scores = first.query, first.query_scores
    batch, keeps = matrix.joined(spans), [row.keep(round(0.45 * len(s)), s) for s in spans]
    with torch.no_grad():
        reduced(reducer, batch, keeps)  # fills caches
        with Calls() as counted:
            reduced(reducer, batch, keeps)
    return counted.calls


@pytest.mark.thin(2)
@pytest.mark.parametrize("kind", [image, video])
@pytest.mark.parametrize("case", matrix.step_cases(), ids=matrix.case_id)
def test_calls_do_not_grow_with_the_batch(case: Case, kind: Callable[[int], VisualTokens]) -> None:
    few, many = (calls(case, [*map(kind, range(2 * n))]) for n in (FEW, MANY))
    assert many <= few + MORE


@pytest.mark.thin(2)
@pytest.mark.parametrize("grids", [IMAGES, VIDEOS], ids=["images", "videos"])
@pytest.mark.parametrize("case", matrix.step_cases(), ids=matrix.case_id)
def test_calls_do_not_grow_with_the_sizes(case: Case, grids: list[tuple[int, int, int]]) -> None:
    """Of 16 spans of as many sizes, against the smallest, the largest and two others of them."""
    few, many = (
        calls(case, [clip(grids[i], special=0) for i in numbers])
        for numbers in (EXTREMES, range(len(grids)))
    )
    sizes = len(grids) - len(EXTREMES)
    assert many <= few + MORE + PER_SIZE.get(case[0], 0) * sizes


@pytest.mark.parametrize("reducer", ["uniform", "cdpruner"])
def test_calls_that_a_prefill_adds_do_not_grow_with_the_batch(reducer: str) -> None:
    """With what the engine does for a reducer, such as finding the text of every prompt."""
    model = tiny_model(layers=2)
    few, many = (measure(model, reducer, 2, prompts)[0].calls for prompts in (FEW, MANY))
    assert few > 0 and many <= few + MORE


@pytest.mark.parametrize("lengths", [[1], [5], [16, 17, 1], [300, 2, 256]])
def test_means_of_texts(lengths: list[int]) -> None:
    """Against a loop; bit by bit for texts alone, so that no choice depends on other prompts."""
    x = torch.randn(sum(lengths), 24)
    texts, together = x.split(lengths), means(x, lengths)
    want = torch.stack([text.double().mean(0).float() for text in texts])
    torch.testing.assert_close(together, want, atol=1e-6, rtol=1e-5)
    assert torch.equal(together, torch.cat([means(text, [len(text)]) for text in texts]))
