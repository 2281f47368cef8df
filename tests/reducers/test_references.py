"""Each method against its paper, written as plain loops over Python numbers."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from support import matrix
from support.max_min import k_center

from tokencomp import Tokens, make_reducer
from tokencomp.errors import ScoreError
from tokencomp.reducers import ScoreReducer
from tokencomp.tokens.signals import Attention

GRIDS = [(1, 5, 6), (4, 3, 4), (6, 2, 3)]


def cosine(a: list[float], b: list[float]) -> float:
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(sum(x * x for x in a)) / math.sqrt(sum(y * y for y in b))


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
    assert matrix.kept(make_reducer("divprune"), given, keep).rows.tolist() == expected


@pytest.mark.parametrize(
    ("grid", "power", "margin"),
    [
        (GRIDS[0], 2.0, 0.1),
        (GRIDS[1], 1.0, 2.0),
        (GRIDS[2], 0.5, 0.0),
    ],
)
def test_condiv(grid: tuple[int, int, int], power: float, margin: float) -> None:
    given = matrix.tokens(grid)
    x = given.features.double().tolist()
    scores = given.scores.tolist()
    weights = [max(s / max(scores), 1e-3) ** power for s in scores]
    chosen = farthest_first(x, weights.index(max(weights)), weights, 7, margin)
    got = make_reducer("condiv", power=power, margin=margin)
    assert matrix.kept(got, given, 7).rows.tolist() == chosen


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
    kept = {margin: matrix.kept(one, given, 4).rows.tolist() for margin, one in reducers.items()}
    assert set(things) <= set(kept[0.1]) and len(set(things) & set(kept[0.0])) == 1


def test_the_default_chooses_by_the_kind_of_media() -> None:
    """Spans of one batch are reduced by methods of their own; only videos have relevance."""
    (signal,) = make_reducer("auto").needs
    assert signal == Attention("text", modalities=frozenset({"video"}))
    spans = [
        dataclasses.replace(matrix.tokens((t, 4, 4), seed=seed), modalities=[kind])
        for seed, (t, kind) in enumerate([(1, "image"), (2, "video"), (1, "audio")])
    ]
    kept = matrix.kept(make_reducer("auto"), matrix.joined(spans), 8, 11, 6).rows.tolist()
    image, video, audio = (span.features.double() for span in spans)
    scores = spans[1].scores.tolist()
    weights = [max(s / max(scores), 1e-3) for s in scores]
    first = weights.index(max(weights))
    expected = k_center(image, 8)
    expected += [16 + i for i in farthest_first(video.tolist(), first, weights, 11, 0.2)]
    expected += [48 + int((i + 0.5) * len(audio) / 6) for i in range(6)]
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
    assert got.rows.tolist() == sorted(chosen)


def test_cdpruner_beyond_the_rank() -> None:
    """With d features no more than d tokens are independent; the most relevant others follow."""
    given = matrix.tokens((1, 5, 6), dim=4)
    reducer = make_reducer("cdpruner", relevance="attention")
    first = matrix.kept(reducer, given, 4).rows.tolist()
    rest = sorted(set(range(30)) - set(first), key=lambda i: -float(given.scores[i]))
    assert matrix.kept(reducer, given, 9).rows.tolist() == sorted(first + rest[:5])


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
        kept = matrix.kept(make_reducer("evs"), given, keep).rows.tolist()
        assert kept == sorted([*first, *change[:later]])
    image = matrix.kept(make_reducer("evs"), matrix.tokens((1, 3, 4)), 3).rows
    assert image.tolist() == [2, 6, 10]


@pytest.mark.parametrize(("keep", "temperature"), [(5, 0.5), (12, 0.01), (30, 0.5), (45, 0.01)])
def test_vidcom2(keep: int, temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    t, n, d = 4, 12, 12
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
    assert matrix.kept(make_reducer("vidcom2"), given, keep).rows.tolist() == sorted(expected)


def test_presets_are_prune() -> None:
    for name, schedule in (("fastv", "fastv"), ("pyramiddrop", "pyramid")):
        stages = make_reducer(name).plan(0.5, 32).stages
        assert all(s.reducer.score == "last_query" for s in stages)
        layer = "next" if name == "pyramiddrop" else "previous"
        prune = make_reducer("prune", score="last_query", schedule=schedule, layer=layer)
        assert stages == prune.plan(0.5, 32).stages
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
    got = matrix.kept(Rounded(), matrix.joined(spans), 7, 6).rows.tolist()
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
