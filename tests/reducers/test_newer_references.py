"""Published methods against plain loops written from their formulas."""

from __future__ import annotations

import math

import pytest
import torch
from support import matrix
from support.tower_loops import cosine, dot

from tokencomp import VisualTokens, make_reducer
from tokencomp.errors import ScoreError
from tokencomp.tokens.patches import Patches
from tokencomp.tokens.signals import TOWER_ATTENTION
from tokencomp.tokens.spans import SpanBatch

GRIDS = [(1, 5, 6), (4, 3, 4), (6, 2, 3)]


def patches_of(tokens: VisualTokens) -> tuple[list[int], list[list[float]]]:
    """Places of the patches, and their features in double precision."""
    places = [i for i in range(len(tokens)) if not tokens.special[i]]
    return places, tokens.features[places].double().tolist()


def first_of_largest(values: dict[int, float]) -> int:
    most = max(values.values())
    return min(i for i, v in values.items() if v >= most - 1e-7)


def with_special(tokens: VisualTokens, places: list[int]) -> list[int]:
    return sorted([*places, *tokens.special.nonzero()[:, 0].tolist()])


def test_selector_with_marginal_relevance() -> None:
    given = matrix.tokens(GRIDS[1], special=2)
    places, x = patches_of(given)
    reducer = make_reducer("selector", weights=matrix.small_weights("selector", 12), pick="mmr")
    patches = Patches.of(SpanBatch.of(given), [11])
    logits = reducer.importances(patches, given.scores[places]).tolist()
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


@pytest.mark.parametrize(("grid", "keep"), [(GRIDS[0], 9), (GRIDS[1], 3), (GRIDS[2], 20)])
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
        given.features[left], given.grid, given.special[left], torch.tensor(left), modality="video"
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


@pytest.mark.parametrize(("grid", "saliency"), [(GRIDS[0], "tower"), (GRIDS[1], "none")])
def test_scope(grid: tuple[int, int, int], saliency: str) -> None:
    given = matrix.tokens(grid, special=2)
    places, x = patches_of(given)
    saliencies = given.tower[TOWER_ATTENTION][places].tolist()
    weight = saliencies if saliency == "tower" else [1.0] * len(x)
    chosen = covering([[cosine(a, b) for b in x] for a in x], weight, 9)
    got = make_reducer("scope", saliency=saliency).reduce(given, 11).keep.tolist()
    assert got == with_special(given, [places[i] for i in chosen])


@pytest.mark.parametrize(("grid", "keep"), [(GRIDS[0], 20), (GRIDS[1], 2), (GRIDS[2], 9)])
def test_anchorprune(grid: tuple[int, int, int], keep: int) -> None:
    given = matrix.tokens(grid, special=2)
    places, x = patches_of(given)
    text = given.query.double().tolist()
    importance = given.tower[TOWER_ATTENTION][places].tolist()
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
    got = make_reducer("anchorprune").reduce(given, keep + 2).keep.tolist()
    assert got == with_special(given, [places[i] for i in chosen])


def test_the_anchor_grows_only_until_three_tokens_are_novel() -> None:
    """Tokens much like each other: the anchor is half of the budget; unlike ones: least + 3."""
    given = matrix.tokens((1, 8, 8))
    sizes = {}
    for name, noise in (("alike", 0.01), ("unlike", 1.0)):
        x = torch.ones(64, matrix.DIM) + noise * given.features
        tokens = VisualTokens(x, given.grid, given.special)
        patches = Patches.of(SpanBatch.of(tokens), [32])
        unit = torch.nn.functional.normalize(x, dim=1)
        relevance = (unit @ torch.nn.functional.normalize(given.query, dim=1).T).amax(1)
        _, own = make_reducer("anchorprune")._anchors(patches, unit, relevance)
        sizes[name] = int(own)
    assert sizes["alike"] == 16 and sizes["unlike"] < 16


@pytest.mark.parametrize(("grid", "cover"), [(GRIDS[0], "both"), (GRIDS[1], "picture")])
def test_mmtok(grid: tuple[int, int, int], cover: str) -> None:
    given = matrix.tokens(grid, special=2)
    places, x = patches_of(given)

    def softmax(row: list[float], temperature: float, weight: float) -> list[float]:
        shifted = [math.exp((v - max(row)) / temperature) for v in row]
        return [weight * v / sum(shifted) for v in shifted]

    matrices = [softmax([cosine(a, b) for b in x], 0.2, 0.5 / len(x)) for a in x]
    if cover == "both":
        text = given.query.double().tolist()
        matrices += [softmax([cosine(q, b) for b in x], 0.02, 1 / len(text)) for q in text]
    chosen = covering([[1e3 * v for v in row] for row in matrices], [1.0] * len(x), 9)
    got = make_reducer("mmtok", cover=cover).reduce(given, 11).keep.tolist()
    assert got == with_special(given, [places[i] for i in chosen])


@pytest.mark.parametrize("name", ["anchorprune", "mmtok"])
def test_no_question(name: str) -> None:
    given = matrix.tokens((1, 3, 3))
    given.query = given.query[:0]
    with pytest.raises(ScoreError, match="Put the question after the image"):
        make_reducer(name).reduce(given, 3)


@pytest.mark.parametrize(("frames", "share"), [(4, 0.5), (5, 0.9), (8, 0.31), (10, 0.5)])
def test_dycoke(frames: int, share: float) -> None:
    """Frame 0 of every group stays, 1 and 2 are compared with it, and 3 with 2."""
    n, keep = 12, round(share * 12 * frames)
    given = matrix.tokens((frames, 3, 4))
    _, x = patches_of(given)
    groups = range(0, frames, 4)
    compared = {f: 4 * (f // 4) if f % 4 < 3 else f - 1 for f in range(frames) if f % 4}
    rest = keep - n * len(groups)
    expected = [i for g in groups for i in range(g * n, g * n + n)]
    counts = []
    for f, other in compared.items():
        own = [i for i in make_reducer("dycoke").reduce(given, keep).keep.tolist() if i // n == f]
        counts.append(len(own))
        change = sorted(range(n), key=lambda j: (cosine(x[f * n + j], x[other * n + j]), j))
        expected += [f * n + j for j in change[: len(own)]]
    if rest >= 0:
        assert max(counts) - min(counts) <= 1 and sum(counts) == rest
        kept = make_reducer("dycoke").reduce(given, keep).keep.tolist()
        assert kept == sorted(expected)


def test_dycoke_beyond_its_rule() -> None:
    """Only first frames of groups, evenly spaced; images too; tables mark the ratio."""
    reducer = make_reducer("dycoke")
    kept = reducer.reduce(matrix.tokens((8, 3, 4)), 6).keep.tolist()
    assert kept == [2, 6, 10, 48 + 2, 48 + 6, 48 + 10]
    assert reducer.reduce(matrix.tokens((1, 3, 4)), 3).keep.tolist() == [2, 6, 10]
    assert reducer.deviation(0.8, 28) and not reducer.deviation(0.75, 28)


@pytest.mark.parametrize("keep", [29, 15, 7, 1])
def test_fusion(keep: int) -> None:
    """Runs of similar neighbours, round by round; rows that stand for several tokens weigh more."""
    given = matrix.tokens((30, 1, 1), special=2)
    given.modality, given.sizes = "audio", 1.0 + torch.arange(32.0) % 3
    places, x = patches_of(given)
    runs = [(p, v, float(given.sizes[p])) for p, v in zip(places, x, strict=True)]
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
    got = make_reducer("fusion").reduce(given, keep + 2)
    assert got.keep.tolist() == with_special(given, [p for p, *_ in runs])
    stay = ~given.special[got.keep]
    means = torch.tensor([mean for _, mean, _ in runs])
    torch.testing.assert_close(got.merged[stay], means, atol=1e-5, rtol=0)
    assert got.sizes[stay].tolist() == [s for *_, s in runs]


@pytest.mark.parametrize(
    ("grid", "keep", "texts"),
    [(GRIDS[0], 17, 2), (GRIDS[1], 2, 5), (GRIDS[2], 6, 0), (GRIDS[1], 20, 5)],
)
def test_dart(grid: tuple[int, int, int], keep: int, texts: int) -> None:
    """Pivots by the length of their keys, visual ones first; each adds what is least like it."""
    given = matrix.tokens(grid, special=2)
    given.query, given.query_scores = given.query[:texts], given.query_scores[:texts]
    places, _ = patches_of(given)
    x = given.norm(given.features[places]).double().tolist()
    lengths = given.scores[places].tolist()
    chosen = sorted(range(len(x)), key=lambda i: (-lengths[i], i))[: min(4, keep)]
    own = given.query_scores.tolist()
    text = given.norm(given.query).double().tolist()
    pivots = [x[i] for i in chosen]
    pivots += [text[m] for m in sorted(range(texts), key=lambda m: (-own[m], m))[:4]]
    share = math.ceil((keep - len(chosen)) / len(pivots))
    for pivot in pivots:
        rest = [i for i in range(len(x)) if i not in chosen]
        rest.sort(key=lambda i: (cosine(pivot, x[i]), i))
        chosen += rest[: min(share, keep - len(chosen))]
    got = make_reducer("dart").reduce(given, keep + 2).keep.tolist()
    assert got == with_special(given, [places[i] for i in chosen])
