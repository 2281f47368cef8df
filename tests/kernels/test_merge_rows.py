"""merge_rows is compared with a loop over kept rows."""

import importlib
import math

import pytest
import torch
from support.refused import refused
from tokencomp.kernels import MergedRows, merge_rows
from torch import Tensor


def random_merge(lengths: list[int], kept: float = 0.4) -> tuple[Tensor, Tensor]:
    """Draw kept rows and targets within every segment; a tenth of the other rows is dropped."""
    target, keep, start = [], [], 0
    for length in lengths:
        chosen = (torch.rand(length) < kept).nonzero().squeeze(1)
        if length and len(chosen) == 0:
            chosen = torch.tensor([length - 1])
        into = chosen[torch.randint(max(1, len(chosen)), (length,))] if length else chosen.clone()
        into[torch.rand(length) < 0.1] = -1 - start
        into[chosen] = chosen
        target.append(into + start)
        keep.append(chosen + start)
        start += length
    return torch.cat(target), torch.cat(keep)


def by_hand(
    x: Tensor, target: Tensor, keep: Tensor, sizes: Tensor, weighted: bool
) -> tuple[Tensor, Tensor]:
    x = x.double()
    merged, total = [], []
    for row in keep.tolist():
        members = [i for i, into in enumerate(target.tolist()) if into == row]
        weight = sizes[members].double() if weighted else torch.ones(len(members)).double()
        merged.append((x[members] * weight[:, None]).sum(0) / weight.sum())
        total.append(sizes[members].sum())
    return torch.stack(merged), torch.stack(total)


@pytest.mark.parametrize(
    ("lengths", "dim", "weighted", "dtype"),
    [
        ([6, 0, 33, 1], 70, True, torch.float32),
        ([6, 0, 33, 1], 70, False, torch.float32),
        ([100, 100], 130, True, torch.bfloat16),
    ],
    ids=str,
)
def test_matches_loops(
    place: torch.device, lengths: list[int], dim: int, weighted: bool, dtype: torch.dtype
) -> None:
    rows = sum(lengths)
    x = torch.randn(rows, dim).to(dtype)
    target, keep = random_merge(lengths)
    sizes = torch.randint(1, 5, (rows,)).float()
    want = by_hand(x, target, keep, sizes, weighted)
    for frames in (lengths, None):
        got = merge_rows(
            x.to(place), target.to(place), keep.to(place), sizes.to(place), frames=frames,
            weighted=weighted,
        )  # fmt: skip
        assert got.x.dtype == dtype
        # The result is rounded once to the output dtype, and the interpreter truncates instead.
        tolerance = 1e-5 if dtype == torch.float32 else 2**-7
        assert torch.allclose(got.x.cpu().double(), want[0], rtol=tolerance, atol=1e-5)
        assert torch.allclose(got.sizes.cpu(), want[1])


def test_defaults(place: torch.device) -> None:
    x = torch.randn(4, 8)
    target, keep = torch.tensor([1, 1, 3, 3]), torch.tensor([1, 3])
    got = merge_rows(x.to(place), target.to(place), keep.to(place))
    assert got.sizes.tolist() == [2.0, 2.0]
    assert torch.allclose(got.x.cpu(), (x[::2] + x[1::2]) / 2, atol=1e-6)


def test_long_segments_are_sorted_not_scanned(
    place: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In segments above ``MAX_SCAN`` rows the kernel takes members from a sorted list."""
    if importlib.util.find_spec("triton"):
        triton = importlib.import_module("tokencomp.kernels.merge_rows.triton")
        monkeypatch.setattr(triton, "MAX_SCAN", 100)
    target, keep = random_merge([500], 0.05)
    x, sizes = torch.randn(500, 16), torch.rand(500) + 0.5
    want = by_hand(x, target, keep, sizes, True)
    got = merge_rows(x.to(place), target.to(place), keep.to(place), sizes.to(place))
    assert torch.allclose(got.x.cpu().double(), want[0], atol=1e-5)
    assert torch.allclose(got.sizes.cpu(), want[1])


def test_rows_without_members_are_copied_bit_for_bit(place: torch.device) -> None:
    x = torch.randn(50, 40).bfloat16()
    index = torch.arange(50, device=place)
    got = merge_rows(x.to(place), index, index, frames=25)
    assert torch.equal(got.x.cpu(), x)


def test_gradient(place: torch.device) -> None:
    x = torch.randn(12, 5, dtype=torch.float64, device=place, requires_grad=True)
    target, keep = random_merge([12])
    sizes = torch.rand(12, device=place) + 0.5

    def merged(x: Tensor) -> Tensor:
        return merge_rows(x, target.to(place), keep.to(place), sizes).x

    assert torch.autograd.gradcheck(merged, x)


def test_empty(place: torch.device) -> None:
    none = torch.zeros(0, dtype=torch.int64, device=place)
    got = merge_rows(torch.randn(0, 3, device=place), none, none)
    assert isinstance(got, MergedRows) and got.x.shape == (0, 3) and got.sizes.shape == (0,)


def test_bad_input() -> None:
    target, keep = torch.tensor([1, 1, 3, 3]), torch.tensor([1, 3])
    changes: list[tuple[dict[str, object], str]] = [
        ({"target": torch.tensor([1, 1, 2, 3])}, "keep must be ascending"),
        ({"target": torch.tensor([1, 1, 4, 3])}, "keep must be ascending"),
        ({"target": torch.tensor([1, 3, 3, 3])}, "keep must be ascending"),
        ({"keep": torch.tensor([3, 1])}, "keep must be ascending"),
        ({"keep": torch.tensor([1, 4])}, "keep must be ascending"),
        ({"target": torch.tensor([1, 1, 3])}, "target must have as many"),
        ({"target": torch.tensor([1.0, 1, 3, 3])}, "int32 or int64"),
        ({"sizes": torch.ones(3)}, "sizes must be"),
        ({"frames": 3}, "frames"),
    ]
    refused(merge_rows, {"x": torch.randn(4, 2), "target": target, "keep": keep}, changes)


def test_nan_stays_in_its_own_row(place: torch.device) -> None:
    x = torch.randn(4, 3)
    x[0, 1] = math.nan
    target, keep = torch.tensor([1, 1, 3, 3]), torch.tensor([1, 3])
    got = merge_rows(x.to(place), target.to(place), keep.to(place)).x
    assert got.isnan().sum() == 1 and got[0, 1].isnan()
