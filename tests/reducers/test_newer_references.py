"""Published methods against plain loops written from their formulas."""

from __future__ import annotations

import math

import pytest
import torch
from support import matrix
from support.tower_loops import cosine, dot

from tokencomp import Tokens, make_reducer
from tokencomp.errors import ScoreError
from tokencomp.tokens.signals import TOWER_ATTENTION

GRIDS = [(1, 5, 6), (4, 3, 4), (6, 2, 3)]


def first_of_largest(values: dict[int, float]) -> int:
    most = max(values.values())
    return min(i for i, v in values.items() if v >= most - 1e-7)


def test_selector_with_marginal_relevance() -> None:
    given = matrix.tokens(GRIDS[1])
    x = given.features.double().tolist()
    reducer = make_reducer("selector", weights=matrix.small_weights("selector", 12), pick="mmr")
    logits = reducer.importances(given, given.scores).tolist()
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
    got = matrix.kept(reducer, given, 9).rows.tolist()
    assert got == sorted(chosen)


@pytest.mark.parametrize(("grid", "keep"), [(GRIDS[0], 9), (GRIDS[1], 3), (GRIDS[2], 20)])
def test_vcast(grid: tuple[int, int, int], keep: int) -> None:
    t, n = grid[0], grid[1] * grid[2]
    given = matrix.tokens(grid)
    x = given.features.double().tolist()

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
    assert matrix.kept(make_reducer("vcast"), given, keep).rows.tolist() == expected


def test_vcast_counts_frames_by_what_is_left_of_them() -> None:
    """Of a video that lost a frame and parts of others, every frame keeps at most what it has."""
    given = matrix.tokens((4, 3, 4))
    left = [*range(12), *range(24, 27), *range(36, 48)]
    part = Tokens(
        given.features[left], given.grids, [1], [len(left)], ["video"], torch.tensor(left)
    )
    kept = matrix.kept(make_reducer("vcast"), part, 20).rows
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


@pytest.mark.parametrize(("grid", "saliency"), [(GRIDS[0], "tower"), (GRIDS[1], "none")])
def test_scope(grid: tuple[int, int, int], saliency: str) -> None:
    given = matrix.tokens(grid)
    x = given.features.double().tolist()
    saliencies = given.tower[TOWER_ATTENTION].tolist()
    weight = saliencies if saliency == "tower" else [1.0] * len(x)
    chosen = covering([[cosine(a, b) for b in x] for a in x], weight, 9)
    got = matrix.kept(make_reducer("scope", saliency=saliency), given, 9).rows.tolist()
    assert got == sorted(chosen)


@pytest.mark.parametrize(("grid", "keep"), [(GRIDS[0], 20), (GRIDS[1], 2), (GRIDS[2], 9)])
def test_anchorprune(grid: tuple[int, int, int], keep: int) -> None:
    given = matrix.tokens(grid)
    x = given.features.double().tolist()
    text = given.queries[0].double().tolist()
    importance = given.tower[TOWER_ATTENTION].tolist()
    match = [max(cosine(row, q) for q in text) for row in x]
    ranked = sorted(range(len(x)), key=lambda i: (-match[i], i))
    least = max(1, round(0.15625 * keep))
    most = max(least, keep // 2)
    size, novel = most, 0
    for t in range(least + 1, most + 1):
        novel += 1 - max(cosine(x[ranked[t - 1]], x[j]) for j in ranked[:least]) > 0.2
        if novel == 3:
            size = t
            break
    chosen = ranked[:size]
    while len(chosen) < keep:
        chosen.append(
            first_of_largest(
                {
                    i: importance[i] * min(1 - cosine(x[i], x[j]) for j in chosen)
                    for i in range(len(x))
                    if i not in chosen
                }
            )
        )
    got = matrix.kept(make_reducer("anchorprune"), given, keep).rows.tolist()
    assert got == sorted(chosen)


def test_the_anchor_grows_only_until_three_tokens_are_novel() -> None:
    """Tokens much like each other: the anchor is half of the budget; unlike ones: least + 3."""
    given = matrix.tokens((1, 8, 8))
    sizes = {}
    for name, noise in (("alike", 0.01), ("unlike", 1.0)):
        x = torch.ones(64, matrix.DIM) + noise * given.features
        tokens = Tokens(x, given.grids, [32])
        unit = torch.nn.functional.normalize(x, dim=1)
        relevance = (unit @ torch.nn.functional.normalize(given.queries[0], dim=1).T).amax(1)
        _, own = make_reducer("anchorprune")._anchors(tokens, unit, relevance)
        sizes[name] = int(own)
    assert sizes["alike"] == 16 and sizes["unlike"] < 16


@pytest.mark.parametrize(("grid", "cover"), [(GRIDS[0], "both"), (GRIDS[1], "picture")])
def test_mmtok(grid: tuple[int, int, int], cover: str) -> None:
    given = matrix.tokens(grid)
    x = given.features.double().tolist()

    def softmax(row: list[float], temperature: float, weight: float) -> list[float]:
        shifted = [math.exp((v - max(row)) / temperature) for v in row]
        return [weight * v / sum(shifted) for v in shifted]

    matrices = [softmax([cosine(a, b) for b in x], 0.2, 0.5 / len(x)) for a in x]
    if cover == "both":
        text = given.queries[0].double().tolist()
        matrices += [softmax([cosine(q, b) for b in x], 0.02, 1 / len(text)) for q in text]
    chosen = covering([[1e3 * v for v in row] for row in matrices], [1.0] * len(x), 9)
    got = matrix.kept(make_reducer("mmtok", cover=cover), given, 9).rows.tolist()
    assert got == sorted(chosen)


@pytest.mark.parametrize("name", ["anchorprune", "mmtok"])
def test_no_question(name: str) -> None:
    given = matrix.tokens((1, 3, 3))
    given.queries = [given.queries[0][:0]]
    with pytest.raises(ScoreError, match="Put the question after the image"):
        matrix.kept(make_reducer(name), given, 3)


@pytest.mark.parametrize(("frames", "share"), [(4, 0.5), (5, 0.9), (8, 0.31), (10, 0.5)])
def test_dycoke(frames: int, share: float) -> None:
    """Frame 0 of every group stays, 1 and 2 are compared with it, and 3 with 2."""
    n, keep = 12, round(share * 12 * frames)
    given = matrix.tokens((frames, 3, 4))
    x = given.features.double().tolist()
    groups = range(0, frames, 4)
    compared = {f: 4 * (f // 4) if f % 4 < 3 else f - 1 for f in range(frames) if f % 4}
    rest = keep - n * len(groups)
    expected = [i for g in groups for i in range(g * n, g * n + n)]
    counts, kept = [], matrix.kept(make_reducer("dycoke"), given, keep).rows.tolist()
    for f, other in compared.items():
        own = [i for i in kept if i // n == f]
        counts.append(len(own))
        change = sorted(range(n), key=lambda j: (cosine(x[f * n + j], x[other * n + j]), j))
        expected += [f * n + j for j in change[: len(own)]]
    if rest >= 0:
        assert max(counts) - min(counts) <= 1 and sum(counts) == rest
        assert kept == sorted(expected)


def test_dycoke_beyond_its_rule() -> None:
    """Only first frames of groups, evenly spaced; images too; tables mark the ratio."""
    reducer = make_reducer("dycoke")
    kept = matrix.kept(reducer, matrix.tokens((8, 3, 4)), 6).rows.tolist()
    assert kept == [2, 6, 10, 48 + 2, 48 + 6, 48 + 10]
    assert matrix.kept(reducer, matrix.tokens((1, 3, 4)), 3).rows.tolist() == [2, 6, 10]
    assert reducer.deviation(0.8, 28) and not reducer.deviation(0.75, 28)


@pytest.mark.parametrize("keep", [29, 15, 7, 1])
def test_fusion(keep: int) -> None:
    """Runs of similar neighbours, round by round; rows that stand for several tokens weigh more."""
    given = matrix.tokens((30, 1, 1))
    given.modalities, given.weights = ["audio"], 1.0 + torch.arange(30.0) % 3
    x = given.features.double().tolist()
    runs = [(p, v, float(given.weights[p])) for p, v in enumerate(x)]
    while len(runs) > keep:
        target = max(keep, len(runs) // 2)
        alike = {i: cosine(runs[i][1], runs[i + 1][1]) for i in range(len(runs) - 1)}
        joined = sorted(alike, key=lambda i: (-alike[i], i))[: len(runs) - target]
        groups: list[list[tuple[int, list[float], float]]] = []
        for i, run in enumerate(runs):
            if i - 1 in joined:
                groups[-1].append(run)
            else:
                groups.append([run])
        runs = []
        for group in groups:
            size = sum(s for *_, s in group)
            mean = [sum(s * v[c] for _, v, s in group) / size for c in range(matrix.DIM)]
            runs.append((group[0][0], mean, size))
    got = matrix.kept(make_reducer("fusion"), given, keep)
    assert got.rows.tolist() == [p for p, *_ in runs]
    means = torch.tensor([mean for _, mean, _ in runs])
    torch.testing.assert_close(got.features, means, atol=1e-5, rtol=0)
    assert got.weights.tolist() == [s for *_, s in runs]


@pytest.mark.parametrize(
    ("grid", "keep", "texts"),
    [(GRIDS[0], 17, 2), (GRIDS[1], 2, 5), (GRIDS[2], 6, 0), (GRIDS[1], 20, 5)],
)
def test_dart(grid: tuple[int, int, int], keep: int, texts: int) -> None:
    """Pivots by the length of their keys, visual ones first; each adds what is least like it."""
    given = matrix.tokens(grid)
    given.queries = [given.queries[0][:texts]]
    given.query_scores = [given.query_scores[0][:texts]]
    x = given.norm(given.features).double().tolist()
    lengths = given.scores.tolist()
    chosen = sorted(range(len(x)), key=lambda i: (-lengths[i], i))[: min(4, keep)]
    own = given.query_scores[0].tolist()
    text = given.norm(given.queries[0]).double().tolist()
    pivots = [x[i] for i in chosen]
    pivots += [text[m] for m in sorted(range(texts), key=lambda m: (-own[m], m))[:4]]
    share = math.ceil((keep - len(chosen)) / len(pivots))
    for pivot in pivots:
        rest = [i for i in range(len(x)) if i not in chosen]
        rest.sort(key=lambda i: (cosine(pivot, x[i]), i))
        chosen += rest[: min(share, keep - len(chosen))]
    got = matrix.kept(make_reducer("dart"), given, keep).rows.tolist()
    assert got == sorted(chosen)
