"""dpp_select chooses the rows whose determinants are largest, computed densely in fp64."""

import pytest
import torch
from tokencomp.kernels import KernelError, dpp_select
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


def test_spans_by_determinants() -> None:
    """Spans of different lengths, some with nothing to choose, each as if it were alone."""
    lengths, counts = [20, 1, 9, 20, 5], [6, 1, 4, 6, 0]
    unit = torch.nn.functional.normalize(torch.randn(sum(lengths), 12), dim=1)
    r = torch.rand(len(unit)) + 0.1
    expected, start = [], 0
    for part, weight, k in zip(unit.split(lengths), r.split(lengths), counts, strict=True):
        expected += [start + i for i in by_determinants(part, weight, k)]
        start += len(part)
    assert dpp_select(unit, counts, r, spans=lengths).tolist() == expected


def test_directions_that_are_used_up_go_by_relevance() -> None:
    unit = torch.eye(3).repeat(4, 1)
    r = torch.linspace(1.0, 0.1, 12)
    assert dpp_select(unit, 7, r).tolist() == [0, 1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 11}, r"k must be in \[0, 10\]"),
        ({"unit": torch.ones(10, 4, dtype=torch.float16)}, "float32 or float64"),
        ({"relevance": torch.ones(9)}, "relevance must be"),
        ({"relevance": torch.zeros(10)}, "above 0"),
        ({"spans": [4, 4]}, "spans"),
        ({"k": [1, 2]}, "2 values of k for 1 spans"),
    ],
)
def test_bad_input(change: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {
        "unit": torch.nn.functional.normalize(torch.randn(10, 4), dim=1),
        "k": 3,
        "relevance": torch.ones(10),
        **change,
    }
    with pytest.raises(KernelError, match=message):
        dpp_select(**arguments)  # type: ignore[arg-type]
