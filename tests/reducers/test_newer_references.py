"""Published methods against plain loops written from their formulas."""

from __future__ import annotations

import math

import pytest
import torch
from support import matrix

from tokencomp import VisualTokens, make_reducer
from tokencomp.tokens.signals import TOWER_ATTENTION

GRIDS = [(1, 5, 6), (4, 3, 4), (6, 2, 3)]
every_grid = pytest.mark.parametrize("grid", GRIDS, ids=str)


def patches_of(tokens: VisualTokens) -> tuple[list[int], list[list[float]]]:
    """Places of the patches, and their features in double precision."""
    places = [i for i in range(len(tokens)) if not tokens.special[i]]
    return places, tokens.features[places].double().tolist()


def dot(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def cosine(a: list[float], b: list[float]) -> float:
    return dot(a, b) / math.sqrt(dot(a, a)) / math.sqrt(dot(b, b))


def first_of_largest(values: dict[int, float]) -> int:
    most = max(values.values())
    return min(i for i, v in values.items() if v >= most - 1e-7)


def with_special(tokens: VisualTokens, places: list[int]) -> list[int]:
    return sorted([*places, *tokens.special.nonzero()[:, 0].tolist()])


@every_grid
def test_selector_with_marginal_relevance(grid: tuple[int, int, int]) -> None:
    given = matrix.tokens(grid, special=2)
    places, x = patches_of(given)
    reducer = make_reducer("selector", weights=matrix.small_weights("selector", 12), pick="mmr")
    logits = reducer.importance(given.scores[places][None])[0].tolist()
    low, high = min(logits), max(logits)
    value = [(v - low) / (high - low + 1e-6) for v in logits]
    chosen = [first_of_largest(dict(enumerate(value)))]
    while len(chosen) < 9:
        chosen.append(
            first_of_largest(
                {
                    i: 0.5 * value[i] - 0.5 * max(cosine(x[i], x[j]) for j in chosen)
                    for i in range(len(x))
                    if i not in chosen
                }
            )
        )
    got = reducer.reduce(given, 11).keep.tolist()
    assert got == with_special(given, [places[i] for i in chosen])


@every_grid
@pytest.mark.parametrize("keep", [3, 9, 20])
def test_vcast(grid: tuple[int, int, int], keep: int) -> None:
    t, n = grid[0], grid[1] * grid[2]
    given = matrix.tokens(grid)
    _, x = patches_of(given)

    def unit(v: list[float]) -> list[float]:
        return [a / math.sqrt(dot(v, v)) for a in v]

    def step(a: list[float], b: list[float]) -> list[float]:
        return [q - p for p, q in zip(a, b, strict=True)]

    f = [unit([sum(c) / n for c in zip(*x[i * n : i * n + n], strict=True)]) for i in range(t)]
    bend = [1.0] * t
    for i in range(1, t - 1):
        bend[i] = 1 - cosine(step(f[i - 1], f[i]), step(f[i], f[i + 1]))
    weight = [math.exp(b / 0.7) for b in bend]
    low = 1 if keep >= t else 0
    share = [low + w / sum(weight) * (keep - low * t) for w in weight]
    count = [min(n, int(s)) for s in share]
    order = sorted(range(t), key=lambda i: (int(share[i]) - share[i], i))
    while sum(count) < keep:
        for i in [i for i in order if count[i] < n][: keep - sum(count)]:
            count[i] += 1
    expected = []
    for i in range(t):
        frame = x[i * n : i * n + n]
        norm = [math.sqrt(dot(v, v)) for v in frame]
        width = max(norm) - min(norm) + 1e-6
        score = [
            1 - cosine(v, f[i]) + (length - min(norm)) / width
            for v, length in zip(frame, norm, strict=True)
        ]
        best = sorted(range(n), key=lambda j: (-score[j], j))[: count[i]]
        expected += [i * n + j for j in sorted(best)]
    assert make_reducer("vcast").reduce(given, keep).keep.tolist() == expected


def test_vcast_counts_frames_by_what_is_left_of_them() -> None:
    """Of a video that lost a frame and parts of others, every frame keeps at most what it has."""
    given = matrix.tokens((4, 3, 4))
    left = [*range(12), *range(24, 27), *range(36, 48)]
    part = VisualTokens(
        given.features[left], given.grid, given.special[left], torch.tensor(left), kind="video"
    )
    kept = make_reducer("vcast").reduce(part, 20).keep
    frames = [sum(a <= left[i] < a + 12 for i in kept.tolist()) for a in (0, 12, 24, 36)]
    assert frames[1] == 0 and frames[2] == 3 and sum(frames) == 20


def covering(cover: list[list[float]], weight: list[float], k: int) -> list[int]:
    """Greedy facility location, all gains in every step; `cover` is points × tokens."""
    best, chosen = [0.0] * len(cover), list[int]()
    while len(chosen) < k:
        gain = {
            j: weight[j] * sum(max(0.0, row[j] - b) for row, b in zip(cover, best, strict=True))
            for j in range(len(weight))
            if j not in chosen
        }
        chosen.append(first_of_largest(gain))
        best = [max(b, row[chosen[-1]]) for row, b in zip(cover, best, strict=True)]
    return chosen


@every_grid
@pytest.mark.parametrize("saliency", ["tower", "none"])
def test_scope(grid: tuple[int, int, int], saliency: str) -> None:
    given = matrix.tokens(grid, special=2)
    places, x = patches_of(given)
    saliencies = given.tower[TOWER_ATTENTION][places].tolist()
    weight = saliencies if saliency == "tower" else [1.0] * len(x)
    chosen = covering([[cosine(a, b) for b in x] for a in x], weight, 9)
    got = make_reducer("scope", saliency=saliency).reduce(given, 11).keep.tolist()
    assert got == with_special(given, [places[i] for i in chosen])
