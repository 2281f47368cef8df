"""facility_select makes the plain greedy choice, computed densely in fp64."""

import math

import pytest
import torch
from support.refused import refused
from tokencomp.kernels import facility_select
from tokencomp.kernels.facility_select import naive
from torch import Tensor


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
        monkeypatch.setattr(naive, "DENSE_ENTRIES", 100)


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


def test_bad_input() -> None:
    changes: list[tuple[dict[str, object], str]] = [
        ({"k": 11}, r"k must be in \[0, 10\]"),
        ({"unit": torch.ones(10, 4, dtype=torch.float16)}, "float32 or float64"),
        ({"weights": torch.ones(9)}, "weights must be"),
        ({"weights": -torch.ones(10)}, "at least 0"),
        ({"weights": torch.full((10,), math.nan)}, "finite"),
        ({"spans": [4, 4]}, "spans"),
        ({"points": torch.ones(3, 5)}, r"points must be \(m, 4\)"),
        ({"points": torch.ones(3, 4), "point_spans": [1, 2]}, "2 spans of points for 1"),
        ({"offset": torch.ones(10)}, "give `points`"),
    ]
    refused(facility_select, {"unit": torch.randn(10, 4), "k": 3}, changes)
