"""Every choice of maxmin_select is the best remaining one by a dense fp64 distance matrix."""

import functools
import importlib
import math

import pytest
import torch
from support.max_min import check_greedy, distances
from support.refused import refused
from tokencomp.kernels import maxmin_select
from torch import Tensor

ordered_choices = functools.partial(maxmin_select, ordered=True)


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


def test_start_ties_and_duplicates(place: torch.device) -> None:
    x = torch.eye(4).repeat(2, 1)  # rows 4..7 repeat rows 0..3
    start = torch.tensor([6], device=place)
    got = ordered_choices(x.to(place), 8, start=start)
    # Ties go to the lower row. Once every direction is chosen, only copies remain.
    assert got.tolist() == [6, 0, 1, 3, 2, 4, 5, 7]
    assert maxmin_select(x.to(place), 4, start=start).tolist() == [0, 1, 3, 6]


def test_strided_weights_margins_and_starts(place: torch.device) -> None:
    """Strided views and expanded values give the result of contiguous copies."""
    x, weights = torch.randn(40, 12, device=place), torch.rand(80, device=place)[::2]
    margin = torch.tensor(0.3, device=place).expand(2)
    start = torch.tensor([[3, 0], [7, 0]], device=place)[:, 0]
    options = {"spans": [20, 20]}
    got = ordered_choices(x, 6, weights, margin=margin, start=start, **options)
    solid = {"margin": margin.clone(), "start": start.clone()}
    assert got.tolist() == ordered_choices(x, 6, weights.clone(), **solid, **options).tolist()
    check_greedy(x[:20].cpu(), got[:6].tolist(), weights[:20].cpu(), 1e-5, 0.3)


def test_zero_weights_come_last(place: torch.device) -> None:
    x = torch.randn(30, 8, device=place)
    weights = torch.zeros(30, device=place)
    weights[10:20] = 1.0
    assert maxmin_select(x, 10, weights).tolist() == list(range(10, 20))
    margin = torch.tensor([0.5], device=place)
    assert maxmin_select(x, 10, weights, margin=margin).tolist() == list(range(10, 20))


def test_bad_input() -> None:
    ones, start = torch.ones(10), torch.arange(3)
    changes: list[tuple[dict[str, object], str]] = [
        ({"k": 11}, r"k must be in \[0, 10\]"),
        ({"k": [2, 2]}, "2 values of k for 1 spans"),
        ({"spans": 3}, "spans"),
        ({"weights": torch.ones(9)}, "weights must be"),
        ({"weights": -ones}, "weights, margins and bonuses must be"),
        ({"weights": ones * math.nan}, "at least 0"),
        ({"margin": torch.tensor([-0.1])}, "margins and bonuses must be finite"),
        ({"margin": torch.tensor([math.inf])}, "margins and bonuses must be finite"),
        ({"margin": torch.tensor([-0.1]), "weights": ones}, "margins and bonuses must be finite"),
        ({"margin": torch.zeros(2)}, r"margin must be \(1,\)"),
        ({"metric": "l1"}, "metric='l1' is not known; allowed: cosine, rms"),
        ({"start": "first"}, "start='first' is not known; allowed: isolated"),
        ({"start": torch.tensor([10])}, "inside its span"),
        ({"start": torch.tensor([0, 1])}, "start must be"),
        ({"start": torch.tensor([0.0])}, "int32 or int64"),
        ({"bonus": torch.ones(9)}, r"bonus must be \(10,\)"),
        ({"bonus": -ones}, "bonuses must be finite and at least 0"),
        ({"given": torch.tensor([2])}, "with `start`"),
        ({"given": torch.tensor([2]), "start": start[:1]}, r"start must be \(3,\)"),
        ({"given": torch.tensor([0]), "start": start}, "given must be from 1 to k"),
        ({"given": torch.tensor([4]), "start": start}, "given must be from 1 to k"),
        ({"given": torch.tensor([2]), "start": 10 * start}, "inside its span"),
    ]
    refused(maxmin_select, {"x": torch.randn(10, 4), "k": 3}, changes)
