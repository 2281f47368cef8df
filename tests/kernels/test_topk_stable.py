"""topk_stable is compared with sorting pairs (score, index) in Python."""

import importlib
import math
from types import SimpleNamespace

import pytest
import torch
from tokencomp.kernels import KernelError, topk_stable
from torch import Tensor


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


def test_nan_and_bad_k_are_refused(place: torch.device) -> None:
    scores = torch.tensor([1.0, math.nan, 0.0], device=place)
    with pytest.raises(KernelError, match="NaN"):
        topk_stable(scores, 1)
    for k in (-1, 4):
        with pytest.raises(KernelError, match=r"k must be in \[0, 3\]"):
            topk_stable(torch.zeros(3, device=place), k)
    with pytest.raises(KernelError, match="real"):
        topk_stable(torch.zeros(3, dtype=torch.complex64, device=place), 0)
    for shape in ((), (2, 3)):
        with pytest.raises(KernelError, match="must have shape"):
            topk_stable(torch.zeros(shape, device=place), 0)


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
    monkeypatch.setattr(importlib.import_module("tokencomp.kernels.topk_stable"), "LONGEST", 10)
    scores = torch.randint(3, (30,)).float()
    assert topk_stable(scores.to(place), 7).tolist() == by_hand(scores.tolist(), 7)


def test_spans_without_rows(place: torch.device) -> None:
    for spans in ([], [0], [0, 0, 0]):
        chosen = topk_stable(torch.zeros(0, device=place), [0] * len(spans), spans=spans)
        assert chosen.shape == (0,) and chosen.dtype == torch.int64
