"""Every choice of maxmin_select is the best remaining one by a dense fp64 distance matrix."""

import functools
import importlib
import math

import pytest
import torch
from support.max_min import check_greedy, differences, distances
from torch import Tensor

from tokencomp.kernels import maxmin_select, mean_distance

ordered_choices = functools.partial(maxmin_select, ordered=True)
ROUNDING = 2e-7  # relative, as two batches of another shape differ


def by_hand(
    x: Tensor, weights: Tensor, k: int, start: list[int], margin: float = 0.0,
    bonus: list[float] | None = None,
) -> list[int]:  # fmt: skip
    """Apply the rule in plain loops; ties go to the lower row."""
    distance, weights, order = distances(x).tolist(), weights.tolist(), [*start]
    more = [0.0] * len(x) if bonus is None else bonus
    while len(order) < k:
        remaining = [i for i in range(len(x)) if i not in order]
        near = {i: margin + min(distance[i][j] for j in order) for i in remaining}
        score = {i: weights[i] * near[i] + more[i] for i in remaining}
        order.append(max(remaining, key=score.__getitem__))
    return order


@pytest.mark.parametrize(
    ("lengths", "counts", "dim", "weighted", "margins", "dtype"),
    [
        ([40, 40, 40], [7, 7, 7], 70, False, False, torch.float32),
        ([60, 0, 1, 90], [60, 0, 1, 20], 33, True, True, torch.float32),
        ([150, 150], [20, 20], 8, True, False, torch.bfloat16),
        ([60, 0, 1, 90], [60, 0, 1, 20], 33, False, True, torch.bfloat16),
    ],
    ids=str,
)
def test_greedy(
    place: torch.device, lengths: list[int], counts: list[int], dim: int, weighted: bool,
    margins: bool, dtype: torch.dtype,
) -> None:  # fmt: skip
    x = (torch.randn(sum(lengths), dim) + 0.3).to(dtype)
    weights = torch.rand(len(x)) if weighted else None
    margin = torch.rand(len(lengths)) if margins else torch.zeros(len(lengths))
    got = ordered_choices(
        x.to(place), counts, None if weights is None else weights.to(place), spans=lengths,
        margin=margin.to(place) if margins else None,
    ).cpu()  # fmt: skip
    start = 0
    for rows, picks, m in zip(x.split(lengths), got.split(counts), margin.tolist(), strict=True):
        order = (picks - start).tolist()
        if not order:
            start += len(rows)
            continue
        part = None if weights is None else weights[start : start + len(rows)]
        mean = rows.double().mean(0)
        far = 1 - torch.nn.functional.cosine_similarity(rows.double(), mean[None])
        first = far if part is None else part.double()
        assert first[order[0]] >= first.max() - 1e-6
        check_greedy(rows, order, part, 1e-5 if dtype == torch.float32 else 1e-3, m)
        start += len(rows)


@pytest.mark.parametrize(("weighted", "rounds"), [(False, False), (True, True)])
def test_bonuses_and_several_first_choices(
    place: torch.device, weighted: bool, rounds: bool, request: pytest.FixtureRequest
) -> None:
    """Spans with as many first choices as stand in `given`; what stands behind is not read."""
    if rounds:
        request.getfixturevalue("short_rounds")
    lengths, counts, given = [100, 30, 100, 7, 100], [40, 12, 40, 0, 40], [9, 1, 40, 0, 1]
    x, bonus = torch.randn(sum(lengths), 20), torch.rand(sum(lengths))
    weights = torch.rand(len(x)) if weighted else None
    starts = [torch.randperm(n)[:k] for n, k in zip(lengths, counts, strict=True)]
    entries = [
        torch.cat([s[:g], torch.full((k - g,), 10**9)])
        for s, g, k in zip(starts, given, counts, strict=True)
    ]
    how = {"spans": lengths, "bonus": bonus.to(place)}
    if weights is not None:
        how["weights"] = weights.to(place)
    several = {"start": torch.cat(entries).to(place), "given": torch.tensor(given, device=place)}
    for options in (several, {}):
        got, first = ordered_choices(x.to(place), counts, **how, **options).cpu(), 0
        for picks, n, s, g in zip(got.split(counts), lengths, starts, given, strict=True):
            own = slice(first, first + n)
            w = torch.ones(n) if weights is None else weights[own]
            if len(picks):
                begin = s[:g].tolist() if options else [int(bonus[own].argmax())]
                want = by_hand(x[own], w, len(picks), begin, bonus=bonus[own].tolist())
                assert (picks - first).tolist() == want
            first += n


@pytest.mark.parametrize(
    ("margin", "k", "rounds"), [(0.0, 100, False), (0.0, 90, True), (0.25, 100, True)]
)
def test_ties_everywhere(
    place: torch.device, margin: float, k: int, rounds: bool, request: pytest.FixtureRequest
) -> None:
    """One-hot rows have exact cosines, and weights of powers of two exact scores."""
    if rounds:
        request.getfixturevalue("short_rounds")
    x = torch.eye(20)[torch.randint(20, (100,))]
    weights = 0.5 ** torch.randint(4, (100,)).float()
    margins = torch.tensor([margin], device=place)
    got = ordered_choices(x.to(place), k, weights.to(place), margin=margins)
    assert got.tolist() == by_hand(x, weights, k, [int(weights.argmax())], margin)


@pytest.mark.parametrize(("weighted", "rounds"), [(True, False), (False, True)])
def test_copies_go_by_weight_then_by_row(
    place: torch.device, weighted: bool, rounds: bool, request: pytest.FixtureRequest
) -> None:
    """The cosine of two copies differs from 1 by rounding, which must not rank copies."""
    if rounds:
        request.getfixturevalue("short_rounds")
    x = torch.randn(7, 300).repeat(15, 1)
    weights = torch.rand(105) if weighted else torch.ones(105)
    start = weights.argmax()[None]
    got = ordered_choices(x.to(place), 70, weights.to(place), start=start.to(place)).tolist()
    assert len({i % 7 for i in got[:7]}) == 7
    check_greedy(x, got[:7], weights, 1e-6)
    remaining = [i for i in range(105) if i not in got[:7]]
    assert got[7:] == sorted(remaining, key=lambda i: (-weights[i], i))[:63]


def test_spans_in_several_groups(place: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(90, 16, device=place)
    weights, margin = torch.rand(90, device=place), torch.rand(3, device=place)
    parts = [(i, slice(30 * i, 30 * i + 30)) for i in range(3)]
    want = torch.cat(
        [maxmin_select(x[s], 5, weights[s], margin=margin[i : i + 1]) + 30 * i for i, s in parts]
    )
    if importlib.util.find_spec("triton"):
        triton = importlib.import_module("tokencomp.kernels.maxmin_select.triton")
        monkeypatch.setattr(triton, "GRAM_ELEMENTS", 2000)
    assert torch.equal(maxmin_select(x, 5, weights, spans=30, margin=margin), want)


def test_zero_weights_come_last(place: torch.device) -> None:
    x = torch.randn(30, 8, device=place)
    weights = torch.zeros(30, device=place)
    weights[10:20] = 1.0
    assert maxmin_select(x, 10, weights).tolist() == list(range(10, 20))
    margin = torch.tensor([0.5], device=place)
    assert maxmin_select(x, 10, weights, margin=margin).tolist() == list(range(10, 20))


# -- root mean squares, and the most isolated row ----------------------------------------------


@pytest.mark.parametrize(
    ("lengths", "counts", "dim", "rounds", "weighted", "dtype"),
    [
        ([34, 0, 3, 17], [33, 0, 3, 12], 7, False, False, torch.bfloat16),
        ([34, 0, 3, 17], [33, 0, 3, 12], 7, False, True, torch.float32),
        ([20, 66], [0, 30], 5, True, False, torch.float32),
        ([20, 66], [0, 30], 5, True, True, torch.float32),
    ],
)
def test_root_mean_square(
    place: torch.device, lengths: list[int], counts: list[int], dim: int, rounds: bool,
    weighted: bool, dtype: torch.dtype, request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    """Spans of all lengths; half of the rows are copies, whose distance is exactly 0."""
    if rounds:
        request.getfixturevalue("short_rounds")
    x = 3.0 + torch.randn(sum(lengths), dim)
    x[::2] = x[torch.randint(len(x), (len(x[::2]),))]
    x, weights = x.to(dtype), torch.rand(len(x)) if weighted else None
    margin = torch.rand(len(lengths)) if weighted else None
    got = ordered_choices(
        x.to(place), counts, None if weights is None else weights.to(place), spans=lengths,
        metric="rms", margin=None if margin is None else margin.to(place),
    ).cpu()  # fmt: skip
    start = 0
    for s, (rows, picks) in enumerate(zip(x.split(lengths), got.split(counts), strict=True)):
        order = (picks - start).tolist()
        part = torch.ones(len(rows)) if weights is None else weights[start : start + len(rows)]
        start += len(rows)
        if not order:
            continue
        wide = rows.double()
        far = (wide - wide.mean(0)).square().sum(1)
        first = far if weights is None else part.double()
        assert first[order[0]] >= first.max() - 1e-4
        check_greedy(
            rows, order, part, 1e-6, 0.0 if margin is None else float(margin[s]),
            differences(rows),
        )  # fmt: skip


@pytest.mark.parametrize("rounds", [False, True], ids=["at once", "in rounds"])
def test_copies_of_long_rows_come_last(
    place: torch.device, rounds: bool, request: pytest.FixtureRequest
) -> None:
    """Squared norms that are subtracted leave more than copies differ by, in fp32."""
    if rounds:
        request.getfixturevalue("short_rounds")
    x = (100 + 100 * torch.randn(20, 300)).repeat(4, 1)
    x[:20] += 0.01 * torch.randn(20, 300)  # not copies
    got = ordered_choices(x.to(place), 80, metric="rms").tolist()
    assert {i if i < 20 else i % 20 + 20 for i in got[:40]} == {*range(40)}
    assert got[40:] == sorted(got[40:])


@pytest.mark.parametrize("metric", ["cosine", "rms"])
@pytest.mark.parametrize("rounds", [False, True], ids=["at once", "in rounds"])
def test_isolated_start(
    place: torch.device, rounds: bool, metric: str, request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The first choice is the row whose nearest other row is farthest, also block by block."""
    if rounds:
        request.getfixturevalue("short_rounds")
        monkeypatch.setitem(maxmin_select.__globals__, "GRAM_ELEMENTS", 300)
    lengths = [70, 1, 33, 70]
    x = torch.randn(sum(lengths), 6)
    got = ordered_choices(x.to(place), 1, spans=lengths, start="isolated", metric=metric).tolist()
    start = 0
    for part, pick in zip(x.split(lengths), got, strict=True):
        distance = differences(part) if metric == "rms" else distances(part)
        nearest = distance.fill_diagonal_(math.inf).amin(1)
        assert nearest[pick - start] >= nearest.max() - 1e-5
        start += len(part)


# -- long spans --------------------------------------------------------------------------------


@pytest.mark.parametrize(("margin", "weighted"), [(0.0, False), (0.2, True)])
def test_long_spans_choose_in_rounds(
    place: torch.device, margin: float, weighted: bool, short_rounds: None
) -> None:
    """With noisy copies of a scene, one choice makes most of the best rows useless."""
    x = torch.randn(11, 40).repeat(10, 1) + 0.05 * torch.randn(110, 40)
    x = torch.cat([x, torch.randn(40, 40)])
    weights = torch.rand(150) if weighted else None
    place_weights = None if weights is None else weights.to(place)
    got = ordered_choices(
        x.to(place), [60, 9], place_weights, spans=[110, 40],
        margin=torch.tensor([margin, 0.0], device=place) if margin else None,
    ).cpu()  # fmt: skip
    part = None if weights is None else weights[:110]
    check_greedy(x[:110], got[:60].tolist(), part, 1e-6, margin)
    part = None if weights is None else weights[110:]
    check_greedy(x[110:], (got[60:] - 110).tolist(), part, 1e-6)


# -- scores that differ by rounding alone --------------------------------------------------------


def noisy(x: Tensor) -> Tensor:
    return (x * (1 + ROUNDING * torch.randn_like(x))).float()


def in_loops(distance: Tensor, weights: list[float], k: int, start: int | None) -> list[int]:
    """The rule in plain loops: of the scores above (1 - 4e-6) of the best, the first."""
    rows, order = range(len(weights)), []

    def first(scores: dict[int, float]) -> int:
        return min(i for i, s in scores.items() if s >= (1 - 4e-6) * max(scores.values()))

    if start is None:  # the most isolated row
        nearest = {i: min(float(distance[i, j]) for j in rows if j != i) for i in rows}
        start = first(nearest)
    order = [start]
    while len(order) < k:
        left = [i for i in rows if i not in order]
        order.append(
            first({i: weights[i] * min(float(distance[i, j]) for j in order) for i in left})
        )
    return order


@pytest.mark.parametrize("metric", ["cosine", "rms"])
@pytest.mark.parametrize("start", [None, "isolated"])
def test_two_rows(place: torch.device, metric: str, start: str | None) -> None:
    """Each is as far from the other and from their mean; rounding decided."""
    for dim in (3, 64):
        x = torch.randn(40, dim, dtype=torch.float64)
        if metric == "cosine":
            x = x / x.norm(dim=1, keepdim=True)  # so that the mean is as far from both
        got = maxmin_select(noisy(x).to(place), 1, spans=2, start=start, metric=metric)
        assert got.tolist() == list(range(0, 40, 2))


@pytest.mark.parametrize(
    ("isolated", "weighted", "rounds", "metric"),
    [
        (False, False, False, "cosine"),
        (False, True, True, "cosine"),
        (True, True, False, "cosine"),
        (False, True, False, "rms"),
        (True, False, True, "rms"),
    ],
)
def test_copies_up_to_rounding(
    place: torch.device, isolated: bool, weighted: bool, rounds: bool, metric: str,
    request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    """12 looks of several rows each, in any order."""
    if rounds:
        request.getfixturevalue("short_rounds")
    look = torch.randint(12, (108,))
    x = torch.randn(12, 48, dtype=torch.float64)[look]
    weights = 0.5 ** torch.randint(3, (12,)).double()[look] if weighted else torch.ones(108)
    exact = distances(x) if metric == "cosine" else differences(x)
    begin = None if isolated else int(weights.argmax())
    expected = in_loops(exact, weights.tolist(), 30, begin)
    assert weighted or len(set(look[expected[:12]].tolist())) == 12
    options = {"start": "isolated" if isolated else torch.tensor([begin], device=place)}
    given = noisy(weights).to(place) if weighted else None
    got = ordered_choices(noisy(x).to(place), 30, given, metric=metric, **options)
    assert got.tolist() == expected


# -- the mean distance, and arguments ------------------------------------------------------------


@pytest.mark.parametrize("kind", ["offset", "zero rows", "few rows", "flat", "copies", "large"])
def test_mean_distance(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean equals that over all pairs of rows, computed one by one."""
    x = torch.randn({"few rows": 2}.get(kind, 50), 33) + (3.0 if kind == "offset" else 0.5)
    if kind == "zero rows":
        x[::3] = 0.0
    elif kind in ("flat", "copies"):
        x[:] = x[0]
        x[1] += 1.0 if kind == "flat" else 0.0
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        low = (x * (200 if kind == "large" else 1)).to(dtype)
        unit = [row / row.norm() if row.norm() else row * 0 for row in low.double()]
        expected = sum(1 - a @ b for a in unit for b in unit) / len(unit) ** 2
        for block in (1 << 24, 100):
            monkeypatch.setitem(mean_distance.__globals__, "BLOCK_ELEMENTS", block)
            got = mean_distance(low)
            assert got.shape == (1,) and got.dtype == torch.promote_types(dtype, torch.float32)
            assert abs(float(got) - float(expected)) < 1e-5


def test_mean_distance_of_spans(place: torch.device) -> None:
    """Every span has the mean of its own pairs, whatever stands beside it."""
    lengths = [33, 1, 40, 33]
    x = torch.randn(sum(lengths), 70) + 0.3
    got = mean_distance(x.to(place), spans=lengths).cpu()
    alone = torch.cat([mean_distance(part.to(place)).cpu() for part in x.split(lengths)])
    assert torch.equal(got, alone)
    expected = [distances(part).clamp(min=0).mean() for part in x.split(lengths)]
    assert torch.allclose(got.double()[[0, 2, 3]], torch.stack(expected)[[0, 2, 3]], atol=1e-5)
