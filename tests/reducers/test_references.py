"""Each method against its paper, written as plain loops over Python numbers."""

from __future__ import annotations

import dataclasses
import math
import random

import numpy as np
import pytest
import torch
from support import matrix, merge_loops
from support.max_min import k_center, naive_steps
from support.tower_loops import cosine, dot

from tokencomp import Tokens, make_reducer
from tokencomp.errors import ScoreError
from tokencomp.reducers import ScoreReducer, vidcom2
from tokencomp.tokens.signals import TOWER_ATTENTION, Attention

GRIDS = [(1, 5, 6), (4, 3, 4), (6, 2, 3)]


def farthest_first(
    x: list[list[float]], first: int, w: list[float], k: int, margin: float = 0.0
) -> list[int]:
    """`margin`: share of the mean distance of all pairs that is added to every distance."""
    extra = margin * sum(1 - cosine(a, b) for a in x for b in x) / len(x) ** 2 if margin else 0.0
    chosen = [first]
    while len(chosen) < k:
        best, value = -1, -1.0
        for i in range(len(x)):
            if i in chosen:
                continue
            gap = w[i] * (extra + min(max(1 - cosine(x[i], x[j]), 1e-5) for j in chosen))
            if gap > value:
                best, value = i, gap
        chosen.append(best)
    return sorted(chosen)


@pytest.mark.parametrize(("grid", "keep"), [(GRIDS[0], 1), (GRIDS[1], 20), (GRIDS[2], 9)])
def test_divprune(grid: tuple[int, int, int], keep: int) -> None:
    given = matrix.tokens(grid)
    x = given.features.double().tolist()
    n = len(x)
    near = [max(cosine(x[i], x[j]) for j in range(n) if j != i) for i in range(n)]
    expected = farthest_first(x, near.index(min(near)), [1.0] * n, keep)
    assert matrix.kept(make_reducer("divprune"), given, keep).patches.tolist() == expected


@pytest.mark.parametrize(
    ("grid", "options", "relevant"),
    [
        (GRIDS[0], {"power": 2.0, "margin": 0.1}, 30),
        (GRIDS[1], {"power": 1.0, "margin": 2.0}, 48),
        (GRIDS[2], {"power": 0.5, "margin": 0.0}, 36),
        (GRIDS[2], {}, 36),
        (GRIDS[2], {}, 3),
    ],
)
def test_condiv(grid: tuple[int, int, int], options: dict[str, float], relevant: int) -> None:
    """Two with the defaults of docs/decisions/0002-condiv-margin.md, one of these with attention
    to three tokens alone: four of those without any are kept by their distance."""
    power, margin = options.get("power", 1.0), options.get("margin", 0.2)
    given = matrix.tokens(grid)
    given.scores[relevant:] = 0.0
    x = given.features.double().tolist()
    scores = given.scores.tolist()
    weights = [max(s / max(scores), 1e-3) ** power for s in scores]
    chosen = farthest_first(x, weights.index(max(weights)), weights, 7, margin)
    got = make_reducer("condiv", **options)
    assert matrix.kept(got, given, 7).patches.tolist() == chosen


def test_the_margin_keeps_like_things_before_the_background() -> None:
    """Three equal objects on a faint, varied background: without a margin two of them go first."""
    thing = torch.nn.functional.normalize(torch.randn(matrix.DIM), dim=0)
    x = torch.randn(16, matrix.DIM)
    things = [2, 7, 13]
    x[things] = thing
    given = matrix.tokens((1, 4, 4))
    given.features, given.scores = x, torch.full((16,), 0.05)
    given.scores[things] = 1.0
    reducers = {margin: make_reducer("condiv", power=1.0, margin=margin) for margin in (0.0, 0.1)}
    kept = {margin: matrix.kept(one, given, 4).patches.tolist() for margin, one in reducers.items()}
    assert set(things) <= set(kept[0.1]) and len(set(things) & set(kept[0.0])) == 1


def test_the_default_chooses_by_the_kind_of_media() -> None:
    """Spans of one batch are reduced by the methods of their modalities, without scores.

    The second video keeps 2 of 32 patches, less than a twelfth, and so without its steps.
    """
    spans = [
        dataclasses.replace(matrix.tokens((t, 4, 4), seed=seed), modalities=[kind])
        for seed, (t, kind) in enumerate([(1, "image"), (2, "video"), (1, "audio"), (2, "video")])
    ]
    kept = matrix.kept(make_reducer("auto"), matrix.joined(spans), 8, 11, 6, 2).patches.tolist()
    image, video, audio, short = (span.features.double() for span in spans)
    steps = naive_steps(video, (2, 4, 4), 4.0, [*range(32)])
    expected = [*k_center(image, 8), *(16 + i for i in k_center(steps, 11))]
    expected += [48 + int((i + 0.5) * len(audio) / 6) for i in range(6)]
    expected += [64 + i for i in k_center(short, 2)]
    assert kept == expected


@pytest.mark.parametrize(
    ("grid", "relevance"), [(GRIDS[0], "query"), (GRIDS[1], "attention"), (GRIDS[2], "query")]
)
def test_cdpruner(grid: tuple[int, int, int], relevance: str) -> None:
    """Each step adds the token with the largest determinant, computed from scratch."""
    given = matrix.tokens(grid, dim=40)
    x = given.features.double().tolist()
    n = len(x)
    if relevance == "query":
        question = given.queries[0].double().tolist()
        r = [-sum(cosine(row, q) for q in question) / len(question) for row in x]
    else:
        r = given.scores.tolist()
    low, high = min(r), max(r)
    r = [(s - low + 1e-6) / (high - low + 1e-6) for s in r]
    kernel = np.array([[r[i] * cosine(x[i], x[j]) * r[j] for j in range(n)] for i in range(n)])
    chosen: list[int] = []
    for _ in range(9):
        rest = [i for i in range(n) if i not in chosen]
        sets = [[*chosen, i] for i in rest]
        gains = [round(np.linalg.det(kernel[np.ix_(s, s)]), 12) for s in sets]
        chosen.append(rest[int(np.argmax(gains))])
    got = matrix.kept(make_reducer("cdpruner", relevance=relevance), given, 9)
    assert got.patches.tolist() == sorted(chosen)


def test_cdpruner_beyond_the_rank() -> None:
    """With d features no more than d tokens are independent; the most relevant others follow."""
    given = matrix.tokens((1, 5, 6), dim=4)
    reducer = make_reducer("cdpruner", relevance="attention")
    first = matrix.kept(reducer, given, 4).patches.tolist()
    rest = sorted(set(range(30)) - set(first), key=lambda i: -float(given.scores[i]))
    assert matrix.kept(reducer, given, 9).patches.tolist() == sorted(first + rest[:5])


def test_cdpruner_without_a_question() -> None:
    given = matrix.tokens((1, 3, 3))
    given.queries = [given.queries[0][:0]]
    with pytest.raises(ScoreError, match="or use divprune"):
        matrix.kept(make_reducer("cdpruner"), given, 3)


def test_evs() -> None:
    """The first frame, as far as half of the budget goes, then the largest changes of all."""
    given = matrix.tokens((4, 3, 4))
    x = given.features.double().tolist()
    change = sorted(range(12, 48), key=lambda i: (cosine(x[i], x[i - 12]), i))
    for keep in (7, 12, 13, 20, 40):
        first, later = ([1, 4, 7, 10], 3) if keep == 7 else ([*range(12)], keep - 12)
        kept = matrix.kept(make_reducer("evs"), given, keep).patches.tolist()
        assert kept == sorted([*first, *change[:later]])
    image = matrix.kept(make_reducer("evs"), matrix.tokens((1, 3, 4)), 3).patches
    assert image.tolist() == [2, 6, 10]


@pytest.mark.parametrize(("keep", "temperature"), [(5, 0.5), (12, 0.01), (30, 0.5), (45, 0.01)])
def test_vidcom2(keep: int, temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unit rows of 24 channels have distances at which every width of the kernel matters."""
    t, n, d = 4, 12, 48
    given = matrix.tokens((t, 3, 4), dim=d)
    x = given.features.double().tolist()
    spread = [np.var([row[c] for row in x]) for c in range(d)]
    quiet = sorted(range(d), key=lambda c: spread[c])[: d // 2]
    x = [[row[c] for c in quiet] for row in x]
    x = [[a / math.sqrt(sum(b * b for b in row)) for a in row] for row in x]

    def mean(rows: list[list[float]]) -> list[float]:
        return [sum(c) / len(rows) for c in zip(*rows, strict=True)]

    def gaussians(a: list[float], b: list[float]) -> float:
        squared = sum((p - q) ** 2 for p, q in zip(a, b, strict=True))
        return sum(math.exp(-squared / (2 * s)) for s in (0.125, 0.25, 0.5, 1.0, 2.0))

    whole = mean(x)
    video = [gaussians(row, whole) for row in x]
    local = [gaussians(row, mean(x[i // n * n :][:n])) for i, row in enumerate(x)]
    sums = torch.tensor([v + w for v, w in zip(video, local, strict=True)])
    found = vidcom2.values_of(given.grids[0], given.features[None])[0, :, 0]
    torch.testing.assert_close(found, sums, atol=1e-5, rtol=1e-5)
    unusual = [-sum(video[f * n :][:n]) / n for f in range(t)]
    weight = [math.exp((u - max(unusual)) / temperature) for u in unusual]
    wanted = [keep / t * (1 + v / sum(weight) - 1 / t) for v in weight]
    quota = [min(n, int(v)) for v in wanted]
    while sum(quota) < keep:  # one token at a time to the largest remainder
        open_ = [f for f in range(t) if quota[f] < n]
        quota[max(open_, key=lambda f: (wanted[f] - quota[f], -f))] += 1
    expected = []
    for f in range(t):
        order = sorted(range(f * n, f * n + n), key=lambda i: (video[i] + local[i], i))
        expected += order[: quota[f]]
    monkeypatch.setattr("tokencomp.reducers.vidcom2.TEMPERATURE", temperature)
    assert matrix.kept(make_reducer("vidcom2"), given, keep).patches.tolist() == sorted(expected)


@pytest.mark.parametrize(
    ("name", "signal"),
    [
        ("fastv", Attention("last")),
        ("pyramiddrop", Attention("last", layer="next")),
        ("sparsevlm", Attention("raters")),
    ],
)
def test_presets_name_their_stages_and_read_their_signal(name: str, signal: Attention) -> None:
    stages = make_reducer(name).plan(0.5, 32).stages
    assert {s.reducer.name for s in stages} == {name}
    assert all(s.needs == {signal} for s in stages)
    scores = matrix.tokens((1, 4, 5)).scores
    assert scores is not None
    best = sorted(sorted(range(20), key=lambda i: -scores[i])[:6])
    assert matrix.reduce((name, {}), matrix.tokens((1, 4, 5)), 6).patches.tolist() == best


def test_cuts_of_presets() -> None:
    (cut,) = make_reducer("fastv").plan(0.5, 32).stages
    assert (cut.layer, cut.fraction) == (2, pytest.approx(14 / 30))
    halves = make_reducer("pyramiddrop").plan(1 - 15 / 32, 32).stages
    assert [(s.layer, s.fraction) for s in halves] == [
        (8, pytest.approx(0.5)),
        (16, pytest.approx(0.25)),
        (24, pytest.approx(0.125)),
    ]


def test_a_score_is_a_whole_reducer() -> None:
    """The best patches of every span stay; of equal ones the lower."""

    class Rounded(ScoreReducer):
        name = "rounded"

        def scores(self, tokens: Tokens) -> torch.Tensor:
            assert len(tokens) == 1
            return tokens.features[:, 0].round()

    spans = [matrix.tokens((1, 4, 5)), matrix.tokens((3, 2, 3), seed=1)]
    got = matrix.kept(Rounded(), matrix.joined(spans), 7, 6).patches.tolist()
    expected, start = [], 0
    for tokens, keep in zip(spans, (7, 6), strict=True):
        score = tokens.features[:, 0].round().tolist()
        order = sorted(range(len(score)), key=lambda i: (-score[i], i))
        expected += sorted(start + i for i in order[:keep])
        start += len(score)
    assert got == expected
    spans[0].features[3, 0] = torch.nan
    with pytest.raises(ScoreError, match="NaN or infinite"):
        matrix.kept(Rounded(), spans[0], 10)


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
    got = matrix.kept(reducer, given, 9).patches.tolist()
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
    assert matrix.kept(make_reducer("vcast"), given, keep).patches.tolist() == expected


def test_vcast_counts_frames_by_what_is_left_of_them() -> None:
    """Of a video that lost a frame and parts of others, every frame keeps at most what it has."""
    given = matrix.tokens((4, 3, 4))
    left = [*range(12), *range(24, 27), *range(36, 48)]
    part = Tokens(
        given.features[left], given.grids, [1], [len(left)], ["video"], torch.tensor(left)
    )
    kept = matrix.kept(make_reducer("vcast"), part, 20).patches
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
    got = matrix.kept(make_reducer("scope", saliency=saliency), given, 9).patches.tolist()
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
    got = matrix.kept(make_reducer("anchorprune"), given, keep).patches.tolist()
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
    got = matrix.kept(make_reducer("mmtok", cover=cover), given, 9).patches.tolist()
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
    counts, kept = [], matrix.kept(make_reducer("dycoke"), given, keep).patches.tolist()
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
    kept = matrix.kept(reducer, matrix.tokens((8, 3, 4)), 6).patches.tolist()
    assert kept == [2, 6, 10, 48 + 2, 48 + 6, 48 + 10]
    assert matrix.kept(reducer, matrix.tokens((1, 3, 4)), 3).patches.tolist() == [2, 6, 10]
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
    assert got.patches.tolist() == [p for p, *_ in runs]
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
    got = matrix.kept(make_reducer("dart"), given, keep).patches.tolist()
    assert got == sorted(chosen)


def left_over(grid: tuple[int, int, int], seed: int) -> Tokens:
    """A span of which half of the patches are left, none of the first third."""
    length = grid[0] * grid[1] * grid[2]
    index = sorted(random.Random(seed).sample(range(length // 3, length), length // 2))
    x = torch.randn(len(index), 6, generator=torch.Generator().manual_seed(seed))
    return Tokens(x, [grid], [1], [len(index)], ["video"], torch.tensor(index))


@pytest.mark.parametrize("grid", [(2, 2, 5), (4, 2, 2), (3, 2, 3), (6, 1, 3)])
def test_uneven_frames(grid: tuple[int, int, int], seed: int = 1) -> None:
    """Tokens merge inside their frame, and as many are left as the budget says."""
    given = left_over(grid, seed)
    live = given.index.tolist()
    frame = {cell: cell // (grid[1] * grid[2]) for cell in live}
    frames = merge_loops.rows_of(given.features, live, frame)
    assert len({len(f) for f in frames}) > 1
    for keep in range(1, len(live)):
        expected = merge_loops.merge(frames, keep)
        got = matrix.kept(make_reducer("bipartite"), given, keep)
        assert given.index[got.patches].tolist() == [row.place for row in expected]
        assert got.weights.tolist() == [row.size for row in expected]
        wanted = torch.tensor([row.x for row in expected])
        assert (got.features - wanted).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_scores_in_the_models_dtype_would_merge_others(dtype: torch.dtype) -> None:
    given = matrix.tokens((1, 16, 16))
    given.features = (given.features + 4).to(dtype)  # all alike: small differences decide
    (exact,) = merge_loops.rows_of(given.features, list(range(256)), dict.fromkeys(range(256), 0))
    expected = [row.place for row in merge_loops.merge_group(exact, 170)]
    unit = torch.nn.functional.normalize(given.features, dim=1)
    rough = (unit[::2] @ unit[1::2].T).amax(1).sort(descending=True, stable=True).indices[:86] * 2
    assert sorted(set(range(256)) - set(rough.tolist())) != expected
    assert matrix.kept(make_reducer("bipartite"), given, 170).patches.tolist() == expected


EVEN = [1, 3, 5, 7, 8, 9, 11, 13, 15, 16, 17, 18, 19]  # 4 and 3 of 5 even places leave


@pytest.mark.parametrize(
    ("name", "kept"),
    [("evs", [*range(13)]), ("vidcom2", [*range(7), *range(10, 16)]), ("bipartite", EVEN)],
)
def test_equal_tokens(name: str, kept: list[int]) -> None:
    """Ties go to the lower index in every frame: it stays, or, in `bipartite`, it leaves first."""
    given = matrix.tokens((2, 2, 5))
    given.features = torch.ones_like(given.features)
    assert matrix.kept(make_reducer(name), given, 13).patches.tolist() == kept


@pytest.mark.parametrize("name", ["divprune", "evs", "bipartite", "vidcom2"])
def test_large_finite_features_in_fp16(name: str) -> None:
    """Finite features whose norms overflow fp16 are chosen from like their fp32 copies."""
    given, wide = (matrix.tokens((3, 2, 4), dim=1024) for _ in range(2))
    given.features = (given.features * 4000).half()
    wide.features = given.features.float()
    assert given.features.isfinite().all() and given.features.norm(dim=1).isinf().any()
    a, b = (matrix.kept(make_reducer(name), tokens, 13).patches for tokens in (given, wide))
    assert torch.equal(a, b)
