"""merge_rows is compared with a loop over kept rows."""

import math
from collections.abc import Callable

import pytest
import torch
from tokencomp.kernels import KernelError, MergedRows, merge_rows
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize(
    ("lengths", "dim"), [([1], 5), ([6, 0, 33, 1], 70), ([100, 100], 130)], ids=str
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


def test_many_rows_are_sorted_not_scanned(
    place: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In segments above ``MAX_SCAN`` rows the kernel takes members from a sorted list."""
    rows = 5000
    target, keep = random_merge([rows], 0.05)
    x, sizes = torch.randn(rows, 16), torch.rand(rows) + 0.5
    want = by_hand(x, target, keep, sizes, True)
    got = merge_rows(x.to(place), target.to(place), keep.to(place), sizes.to(place))
    assert torch.allclose(got.x.cpu().double(), want[0], atol=1e-5)
    assert torch.allclose(got.sizes.cpu(), want[1])


def test_rows_without_members_are_copied_bit_for_bit(place: torch.device) -> None:
    x = torch.randn(50, 40).bfloat16()
    index = torch.arange(50, device=place)
    got = merge_rows(x.to(place), index, index, frames=25)
    assert torch.equal(got.x.cpu(), x)


def test_strided_rows_give_the_same_bits(place: torch.device) -> None:
    target, keep = random_merge([64], 0.1)
    wide = torch.randn(64, 80, device=place)
    target, keep = target.to(place), keep.to(place)
    want = merge_rows(wide[:, :40].contiguous(), target, keep).x
    for x in (wide[:, :40], wide[:, :40].contiguous(), wide[:, :40].T.contiguous().T):
        assert torch.equal(merge_rows(x, target, keep).x, want)


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


BAD: list[tuple[Callable[[dict[str, object]], None], str]] = [
    (lambda a: a.update(target=torch.tensor([1, 1, 2, 3])), "keep must be ascending"),
    (lambda a: a.update(target=torch.tensor([1, 1, 4, 3])), "keep must be ascending"),
    (lambda a: a.update(target=torch.tensor([1, 3, 3, 3])), "keep must be ascending"),
    (lambda a: a.update(keep=torch.tensor([3, 1])), "keep must be ascending"),
    (lambda a: a.update(keep=torch.tensor([1, 4])), "keep must be ascending"),
    (lambda a: a.update(target=torch.tensor([1, 1, 3])), "target must have as many"),
    (lambda a: a.update(target=torch.tensor([1.0, 1, 3, 3])), "int32 or int64"),
    (lambda a: a.update(sizes=torch.ones(3)), "sizes must be"),
    (lambda a: a.update(frames=3), "frames"),
    (lambda a: a.update(x=torch.zeros(4, 2, device="meta")), "one device"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[str(i) for i in range(len(BAD))])
def test_bad_input(change: Callable[[dict[str, object]], None], message: str) -> None:
    arguments: dict[str, object] = {
        "x": torch.randn(4, 2),
        "target": torch.tensor([1, 1, 3, 3]),
        "keep": torch.tensor([1, 3]),
    }
    change(arguments)
    with pytest.raises(KernelError, match=message):
        merge_rows(**arguments)  # type: ignore[arg-type]


def test_nan_stays_in_its_own_row(place: torch.device) -> None:
    x = torch.randn(4, 3)
    x[0, 1] = math.nan
    target, keep = torch.tensor([1, 1, 3, 3]), torch.tensor([1, 3])
    got = merge_rows(x.to(place), target.to(place), keep.to(place)).x
    assert got.isnan().sum() == 1 and got[0, 1].isnan()
