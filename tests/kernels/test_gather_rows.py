"""gather_rows is compared with copying row by row."""

import pytest
import torch
from support.refused import refused
from tokencomp.kernels import gather_rows
from torch import Tensor


def by_hand(tensor: Tensor, index: Tensor, seq: int, batch: int) -> Tensor:
    """Copy the rows of one tensor one by one; negative indices leave zeros."""
    shape = list(tensor.shape)
    shape[batch], shape[seq] = index.shape
    out = torch.zeros(shape, dtype=tensor.dtype)
    for b, row in enumerate(index.tolist()):
        source = tensor.select(batch, b if tensor.shape[batch] > 1 else 0)
        target = out.select(batch, b)
        dim = seq - (seq > batch)
        for m, i in enumerate(row):
            if i >= 0:
                target.select(dim, m).copy_(source.select(dim, i))
    return out


def layer(batch: int, rows: int, dtype: torch.dtype) -> tuple[list[Tensor], list[int], list[int]]:
    """Return all tensors of a decoder layer with a sequence axis, and some unusual layouts."""
    tensors = [
        torch.randn(batch, rows, 70).to(dtype),  # hidden states
        torch.randn(batch, rows, 16).to(dtype),  # cos
        torch.randn(1, rows, 16),  # sin, shared by the batch, another dtype
        torch.randn(3, batch, rows, 16).to(dtype),  # M-RoPE cos
        torch.rand(batch, rows) > 0.5,  # mask
        torch.arange(3 * batch * rows).view(3, batch, rows),  # M-RoPE positions
        torch.randn(batch, 2, rows, 24).to(dtype),  # keys
        torch.randn(batch, rows, 2, 24).to(dtype).transpose(1, 2),  # values, strided
        torch.randn(2, batch, 3, rows, 8).to(dtype),  # several layers in one tensor
        torch.randn(rows, batch, 1300).to(dtype),  # sequence first
        torch.randint(0, 99, (batch, rows, 3, 5), dtype=torch.int32),
    ]
    return tensors, [1, 1, 1, 2, 1, 2, 2, 2, 3, 0, 1], [0, 0, 0, 1, 0, 1, 0, 0, 1, 1, 0]


@pytest.mark.parametrize(
    ("batch", "rows", "out_rows", "dtype"),
    [(1, 50, 20, torch.float32), (3, 37, 41, torch.bfloat16)],
)
def test_matches_copies(
    place: torch.device, batch: int, rows: int, out_rows: int, dtype: torch.dtype
) -> None:
    tensors, seq, batches = layer(batch, rows, dtype)
    index = torch.randint(-rows // 3 - 1, rows, (batch, out_rows))
    got = gather_rows([t.to(place) for t in tensors], index.to(place), seq, batches)
    for tensor, out, s, b in zip(tensors, got, seq, batches, strict=True):
        assert out.is_contiguous() and out.dtype == tensor.dtype
        assert torch.equal(out.cpu(), by_hand(tensor, index, s, b))


def test_negative_dims_int32_index_and_length_one_tail(place: torch.device) -> None:
    x = torch.randn(2, 6, 1, device=place)
    index = torch.tensor([[0, 5], [3, 3]], dtype=torch.int32, device=place)
    (out,) = gather_rows([x], index, -2, -3)
    assert torch.equal(out[:, :, 0].cpu(), x[:, :, 0].cpu().gather(1, index.long().cpu()))


def test_nothing_to_do(place: torch.device) -> None:
    index = torch.zeros(2, 0, dtype=torch.int64, device=place)
    assert gather_rows([], index) == []
    (out,) = gather_rows([torch.randn(2, 4, 3, device=place)], index)
    assert out.shape == (2, 0, 3)
    none = torch.full((2, 3), -1, dtype=torch.int64, device=place)
    (out,) = gather_rows([torch.randn(2, 4, 3, device=place)], none)
    assert (out == 0).all()


def test_gradient(place: torch.device) -> None:
    x = torch.randn(2, 5, 3, dtype=torch.float64, device=place, requires_grad=True)
    index = torch.tensor([[0, 4, -1], [2, 2, 1]], device=place)
    assert torch.autograd.gradcheck(lambda x: gather_rows([x], index)[0], x)


def test_bad_input(place: torch.device) -> None:
    changes: list[tuple[dict[str, object], str]] = [
        ({"index": torch.tensor([[0, 4], [0, 1]])}, "past the last row"),
        ({"index": torch.tensor([[0.0, 1.0]])}, "int32 or int64"),
        ({"index": torch.tensor([0, 1])}, "must have shape"),
        ({"index": torch.tensor([[0], [1], [2]])}, "must hold 3 samples"),
        ({"seq_dims": 3}, "not a dimension"),
        ({"seq_dims": [1, 1]}, "2 entries for 1 tensors"),
        ({"batch_dims": 1}, "must be another one"),
        ({"tensors": [torch.zeros(2, 4, dtype=torch.complex64)]}, "does not move"),
    ]
    index = torch.tensor([[0, 1], [2, 3]])
    refused(gather_rows, {"tensors": [torch.randn(2, 4, 3)], "index": index}, changes)
