"""The study of rankings: average precision by hand, neighbours by a loop, and the page."""

from __future__ import annotations

import pytest
import torch

from benchmarks.accuracy.studies import retrieval


def test_average_precision_by_hand() -> None:
    """Relevant pictures at places 1 and 3 of four: (1/1 + 2/3) / 2."""
    scores = torch.tensor([0.1, 0.9, 0.5, -1.0])
    assert retrieval.average_precision(scores, [True, True, False, False]) == pytest.approx(5 / 6)
    assert retrieval.average_precision(scores, [False, True, False, False]) == 1.0


def test_agreement_by_loops() -> None:
    generator = torch.Generator().manual_seed(0)
    whole = torch.nn.functional.normalize(torch.randn(9, 4, generator=generator))
    own = torch.nn.functional.normalize(whole + torch.randn(9, 4, generator=generator))
    found = retrieval.agreement(own, whole, 3)

    def closest(x: torch.Tensor, i: int) -> set[int]:
        others = sorted((j for j in range(9) if j != i), key=lambda j: -float(x[i] @ x[j]))
        return set(others[:3])

    same = [len(closest(own, i) & closest(whole, i)) / 3 for i in range(9)]
    itself = [max(range(9), key=lambda j: float(own[i] @ whole[j])) == i for i in range(9)]
    assert found["neighbours"] == pytest.approx(sum(same) / 9)
    assert found["self"] == pytest.approx(sum(itself) / 9)
    perfect = retrieval.agreement(whole, whole, 3)
    assert (perfect["self"], perfect["neighbours"]) == (1.0, 1.0)
