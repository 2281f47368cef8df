"""dpp_select chooses the rows whose determinants are largest, computed densely in fp64."""

import pytest
import torch
from support.refused import refused
from tokencomp.kernels import dpp_select
from torch import Tensor


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
    monkeypatch.setattr(triton, "dpp_select", None)  # would fail if it were called
    unit, r = random_spans([12, 12], 6)
    expected = [
        12 * s + i
        for s in (0, 1)
        for i in by_determinants(unit[12 * s :][:12], r[12 * s :][:12], 3)
    ]
    assert dpp_select(unit.to(place), 3, r.to(place), spans=12).tolist() == expected


def test_bad_input() -> None:
    changes: list[tuple[dict[str, object], str]] = [
        ({"k": 11}, r"k must be in \[0, 10\]"),
        ({"unit": torch.ones(10, 4, dtype=torch.float16)}, "float32 or float64"),
        ({"relevance": torch.ones(9)}, "relevance must be"),
        ({"relevance": torch.zeros(10)}, "above 0"),
        ({"spans": [4, 4]}, "spans"),
        ({"k": [1, 2]}, "2 values of k for 1 spans"),
    ]
    unit = torch.nn.functional.normalize(torch.randn(10, 4), dim=1)
    refused(dpp_select, {"unit": unit, "k": 3, "relevance": torch.ones(10)}, changes)
