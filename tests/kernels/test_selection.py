"""topk_stable, dpp_select and facility_select against their definitions in plain loops."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from tokencomp.kernels import dpp_select, facility_select, topk_stable


def by_hand(scores: list[float], k: int) -> list[int]:
    """Rank by descending score, then by ascending index."""
    ranked = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    return sorted(ranked[:k])


@pytest.mark.parametrize("n", [1, 7, 300])
def test_matches_sorted_pairs(place: torch.device, n: int) -> None:
    for distinct in (1, 3, 10_000):
        scores = torch.randint(distinct, (n,)).float() / 7
        for k in {0, 1, n // 2, n - 1, n}:
            got = topk_stable(scores.to(place), k).cpu()
            assert got.dtype == torch.int64
            assert got.tolist() == by_hand(scores.tolist(), k)


def by_bits(x: Tensor, *, dim: int = -1, descending: bool, stable: bool) -> SimpleNamespace:
    """A stable sort by the bits of floats, as radix sorts are: -0.0 comes behind 0.0."""
    bits = x.view(torch.int32)
    order = torch.argsort(
        bits ^ (bits >> 31 & 0x7FFFFFFF), dim=dim, descending=descending, stable=stable
    )
    return SimpleNamespace(indices=order)


def test_ties_infinities_and_signed_zeros(
    place: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Zeros tie whatever their sign, also where the device sorts by bits."""
    scores, sort = [-0.0, 0.0, math.inf, -math.inf, 0.0, math.inf, -math.inf], torch.sort
    for k in range(len(scores) + 1):
        for own in (
            sort,
            lambda x, **how: by_bits(x, **how) if x.is_floating_point() else sort(x, **how),
        ):
            monkeypatch.setattr(torch, "sort", own)
            got = topk_stable(torch.tensor(scores, device=place), k)
            assert got.tolist() == by_hand(scores, k)


def test_scored_in_fp32_for_every_dtype(place: torch.device) -> None:
    scores = torch.tensor([3, 1, 2, 3], device=place)
    for dtype in (torch.int64, torch.float16, torch.bfloat16, torch.float64, torch.bool):
        values = scores.to(dtype)
        assert topk_stable(values, 2).tolist() == by_hand(values.float().tolist(), 2)


@pytest.mark.parametrize(
    ("lengths", "counts"),
    [
        ([50, 50], 20),
        ([9, 0, 1, 12], [4, 0, 1, 12]),
        ([6, 4], [0, 0]),
        ([1100, 33, 129], [1025, 32, 1]),
    ],
    ids=str,
)
def test_spans(place: torch.device, lengths: list[int], counts: int | list[int]) -> None:
    """Every span by hand; many of the scores are equal, some are infinite."""
    scores = torch.randint(4, (sum(lengths),)).float()
    scores[::5] = -math.inf
    each = [counts] * len(lengths) if isinstance(counts, int) else counts
    expected, start = [], 0
    for part, k in zip(scores.split(lengths), each, strict=True):
        expected += [start + i for i in by_hand(part.tolist(), k)]
        start += len(part)
    assert topk_stable(scores.to(place), counts, spans=lengths).tolist() == expected


def test_long_spans_are_sorted(place: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pytest.importorskip("tokencomp.kernels.topk_stable.triton")
    monkeypatch.setattr(triton, "LONGEST", 10)
    monkeypatch.setattr(triton, "rank_kernel", None)  # would fail if it were called
    scores = torch.randint(3, (30,)).float()
    assert topk_stable(scores.to(place), 7).tolist() == by_hand(scores.tolist(), 7)


def by_determinants(unit: Tensor, r: Tensor, k: int) -> list[int]:
    """Add the row with the largest determinant of the chosen kernel, k times."""
    kernel = r[:, None].double() * (unit.double() @ unit.double().T) * r.double()
    chosen: list[int] = []
    for _ in range(k):
        rest = [i for i in range(len(unit)) if i not in chosen]
        gains = [float(torch.det(kernel[[*chosen, i]][:, [*chosen, i]])) for i in rest]
        chosen.append(rest[gains.index(max(gains))])
    return sorted(chosen)


def random_spans(lengths: list[int], dim: int) -> tuple[Tensor, Tensor]:
    unit = torch.nn.functional.normalize(torch.randn(sum(lengths), dim), dim=1)
    return unit, torch.rand(len(unit)) + 0.1


@pytest.mark.parametrize(
    ("lengths", "counts", "dim"),
    [
        ([20, 1, 9, 0, 20, 5], [6, 1, 4, 0, 6, 0], 12),
        ([17, 17, 17], [4, 4, 4], 33),
        ([65, 2], [7, 2], 70),
    ],
    ids=str,
)
def test_spans_by_determinants(
    place: torch.device, lengths: list[int], counts: list[int], dim: int
) -> None:
    """Spans of odd lengths, some with nothing to choose, each as if it were alone."""
    unit, r = random_spans(lengths, dim)
    expected, start = [], 0
    for part, weight, k in zip(unit.split(lengths), r.split(lengths), counts, strict=True):
        expected += [start + i for i in by_determinants(part, weight, k)]
        start += len(part)
    chosen = dpp_select(unit.to(place), counts, r.to(place), spans=lengths)
    assert chosen.dtype == torch.int64 and chosen.tolist() == expected


def test_directions_that_are_used_up_go_by_relevance(place: torch.device) -> None:
    unit = torch.eye(3).repeat(4, 1).to(place)
    r = torch.linspace(1.0, 0.1, 12).to(place)
    assert dpp_select(unit, 7, r).tolist() == [0, 1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("scale", [1e-9, 8.0], ids=str)
def test_copies_come_last_whatever_the_relevance(place: torch.device, scale: float) -> None:
    """Rows are copies of three directions: the best one of each comes first, then the others."""
    axes, r = torch.randint(3, (20,)), (torch.randperm(20) + 1) * (scale / 20)
    ranked = sorted(range(20), key=lambda i: -float(r[i]))
    first = [i for n, i in enumerate(ranked) if axes[i] not in axes[ranked[:n]]]
    order = first + [i for i in ranked if i not in first]
    unit = torch.eye(3)[axes].to(place)
    for k in range(1, 21):
        assert dpp_select(unit, k, r.to(place)).tolist() == sorted(order[:k])


def test_ties_go_to_the_lower_row(place: torch.device) -> None:
    """Copies of three directions with equal relevance: one of each, then the first copies."""
    unit = torch.eye(3)[[2, 2, 0, 0, 1, 1, 2]].to(place)
    ones = torch.ones(7, device=place)
    assert dpp_select(unit, 3, ones).tolist() == [0, 2, 4]
    assert dpp_select(unit, 5, ones).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("limit", ["MAX_ROWS", "MAX_WORK"])
def test_what_one_program_cannot_hold_runs_in_pytorch(
    place: torch.device, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    triton = pytest.importorskip("tokencomp.kernels.dpp_select.triton")
    monkeypatch.setattr(triton, limit, 10)
    monkeypatch.setattr(triton, "cholesky_kernel", None)  # would fail if it were called
    unit, r = random_spans([12, 12], 6)
    expected = [
        12 * s + i
        for s in (0, 1)
        for i in by_determinants(unit[12 * s :][:12], r[12 * s :][:12], 3)
    ]
    assert dpp_select(unit.to(place), 3, r.to(place), spans=12).tolist() == expected


def plain_greedy(cover: list[list[float]], w: list[float], k: int) -> list[int]:
    """All gains in every step, ties by the documented share; `cover` is points × rows."""
    best, chosen = [0.0] * len(cover), []
    for _ in range(k):
        gain = {
            j: w[j] * sum(max(0.0, own[j] - b) for own, b in zip(cover, best, strict=True))
            for j in range(len(w))
            if j not in chosen
        }
        most = max(gain.values())
        chosen.append(next(j for j, g in gain.items() if g >= most * (1 - 4e-6)))
        best = [max(b, own[chosen[-1]]) for own, b in zip(cover, best, strict=True)]
    return sorted(chosen)


def clustered(n: int, dim: int = 24) -> Tensor:
    """Unit rows round a few centres, as the features of pictures are."""
    centres = torch.randn(max(1, n // 8), dim)
    rows = centres[torch.randint(len(centres), (n,))] + 0.4 * torch.randn(n, dim)
    return torch.nn.functional.normalize(rows, dim=1)


def cosines(unit: Tensor) -> list[list[float]]:
    return (unit.double() @ unit.double().T).tolist()


@pytest.fixture(params=["dense", "by column"])
def memory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Spans that keep their matrix, and spans too long for it."""
    if request.param == "by column":
        monkeypatch.setitem(facility_select.__globals__, "DENSE_ENTRIES", 100)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    ("lengths", "counts"),
    [([40, 1, 0, 25, 40], [10, 1, 0, 25, 3]), ([90, 30], [45, 0])],
    ids=str,
)
def test_ragged_spans(
    lengths: list[int], counts: list[int], weighted: bool, memory: None, place: torch.device
) -> None:
    """Each span as if it were alone."""
    unit, w = clustered(sum(lengths)), torch.rand(sum(lengths)) if weighted else None
    on = None if w is None else w.to(place)
    got = facility_select(unit.to(place), counts, on, spans=lengths)
    expected, start = [], 0
    for rows, k in zip(unit.split(lengths), counts, strict=True):
        own = [1.0] * len(rows) if w is None else w[start : start + len(rows)].tolist()
        expected += [start + j for j in plain_greedy(cosines(rows), own, k)]
        start += len(rows)
    assert got.dtype == torch.int64 and got.tolist() == expected


def test_softmax_of_other_points(memory: None, place: torch.device) -> None:
    """Points of another number than rows, covered by a softmax over the rows of their span."""
    lengths, reach, counts = [30, 20], [7, 26], [9, 6]
    unit, points = clustered(50), 4 * clustered(33)
    offset, expected = [], []
    spans = zip(unit.split(lengths), points.split(reach), counts, (0, 30), strict=True)
    for rows, own, k, start in spans:
        logits = own.double() @ rows.double().T
        offset.append(logits.logsumexp(1))
        chosen = plain_greedy(logits.softmax(1).tolist(), [1.0] * len(rows), k)
        expected += [start + j for j in chosen]
    how = {"points": points.to(place), "offset": torch.cat(offset).float().to(place)}
    got = facility_select(unit.to(place), counts, spans=lengths, point_spans=reach, **how)
    assert got.tolist() == expected


def test_ties_and_copies_go_to_the_lower_row(memory: None, place: torch.device) -> None:
    """Copies gain nothing, although the cosine of two copies is rounded."""
    assert facility_select(torch.eye(6, device=place), 3).tolist() == [0, 1, 2]
    copies = torch.nn.functional.normalize(torch.randn(5, 300), dim=1).repeat(8, 1).to(place)
    assert facility_select(copies, 5).tolist() == [0, 1, 2, 3, 4]
    assert facility_select(copies, 9).tolist() == list(range(9))


def test_rows_of_weight_0_come_last(place: torch.device) -> None:
    weights, unit = torch.zeros(30, device=place), clustered(30).to(place)
    weights[10:20] = 1.0
    assert facility_select(unit, 10, weights).tolist() == list(range(10, 20))
    assert facility_select(unit, 12, weights).tolist() == [0, 1, *range(10, 20)]


def test_spans_too_large_for_one_program_run_in_plain_pytorch() -> None:
    triton = pytest.importorskip("tokencomp.kernels.facility_select.triton")
    assert triton.fits([144, 0], [576, 1], [576, 0])
    assert not triton.fits([1, 1], [576, 8193], [576, 1])
    assert not triton.fits([1], [8192], [2049])  # more entries than one matrix may have
    assert not triton.fits([1024], [2048], [1024])
