"""Gathering with one index from all tensors that have a sequence axis."""

import math
from collections.abc import Sequence

import torch
from tokencomp.kernels import checks, dispatch
from tokencomp.kernels.errors import KernelError
from tokencomp.kernels.gather_rows import naive
from torch import Tensor

DTYPES = (
    *checks.FLOATS,
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
)


def gather_rows(
    tensors: Sequence[Tensor],
    index: Tensor,
    seq_dims: int | Sequence[int] = 1,
    batch_dims: int | Sequence[int] = 0,
    trusted: bool = False,
) -> list[Tensor]:
    r"""Gather the same rows from hidden states, cos/sin, masks, positions and KV in one launch.

    .. math:: out_{b, m} = x_{b, index_{b, m}}, \quad 0 \text{ where } index_{b, m} < 0

    Parameters
    ----------
    tensors
        Tensors of any shape and dtype (bool included) that have a batch and a sequence dimension,
        for example ``(B, N, D)`` hidden states, ``(B, N)`` masks, ``(3, B, N)`` M-RoPE positions or
        ``(B, H, N, D)`` keys. N may differ between tensors. All samples share a batch of 1.
    index
        Input row of each output row, int ``(B, M)``. A negative entry gives a padding row of
        zeros, as ragged batches need.
    seq_dims, batch_dims
        Sequence and batch dimension, as one int for all tensors or as one int per tensor. Negative
        values count from the end.
    trusted
        Whether the caller knows that dtypes, devices, sizes and all indices are right. Nothing is
        checked then, and the host need not wait for the device to look at an index.

    Returns
    -------
    list of Tensor
        Contiguous tensors with the shapes and dtypes of the input, except that B and M replace the
        batch and sequence sizes.

    Raises
    ------
    KernelError
        If an index is past a tensor's last row, a dimension or dtype is not supported, or the
        tensors are on different devices.

    Notes
    -----
    The cost is ``2 · Σ B·M·row_bytes`` bytes and no FLOPs. The function is differentiable: if a
    gradient is needed, PyTorch runs instead of the Triton kernel.
    """
    tensors = list(tensors)
    seqs = _dims("seq_dims", seq_dims, tensors)
    batches = _dims("batch_dims", batch_dims, tensors)
    limit = None if trusted else _check(tensors, index, seqs, batches)
    if not tensors:
        return []
    return _op(index.long(), tensors, seqs, batches, limit)


def _check(tensors: list[Tensor], index: Tensor, seqs: list[int], batches: list[int]) -> int | None:
    """Check all but the values of `index`, and return what they must be below."""
    checks.integer("index", index)
    checks.shape("index", index, 2, "(B, M)")
    checks.same_device(index=index, **{f"tensor {i}": t for i, t in enumerate(tensors)})
    rows, written = [], []
    for tensor, seq, batch in zip(tensors, seqs, batches, strict=True):
        if tensor.dtype not in DTYPES:
            raise KernelError(f"gather_rows does not move {tensor.dtype}")
        if seq == batch or tensor.shape[batch] not in (1, len(index)):
            raise KernelError(
                f"tensor {tuple(tensor.shape)}: batch dimension {batch} must hold {len(index)} "
                f"samples (or 1), and the sequence dimension ({seq}) must be another one"
            )
        rows.append(tensor.shape[seq])
        low, high = sorted((seq, batch))
        written.append(index.numel() * math.prod(tensor.shape[:low] + tensor.shape[low + 1 : high]))
    checks.int32_sizes(rows=max(rows, default=0), rows_written=max(written, default=0))
    return min(rows, default=None)


def _check_values(
    index: Tensor, tensors: list[Tensor], seqs: list[int], batches: list[int], limit: int | None
) -> None:
    if limit is not None and index.numel():
        message = f"index has entries past the last row ({limit - 1} of the shortest tensor)"
        checks.holds(index.amax() < limit, message)


def _fake(
    index: Tensor, tensors: list[Tensor], seqs: list[int], batches: list[int], _: int | None
) -> list[Tensor]:
    out = []
    for tensor, seq, batch in zip(tensors, seqs, batches, strict=True):
        shape = list(tensor.shape)
        shape[batch], shape[seq] = index.shape
        out.append(tensor.new_empty(shape))
    return out


_op = dispatch.Op(naive.gather_rows, _fake, _check_values)


def _dims(name: str, value: int | Sequence[int], tensors: list[Tensor]) -> list[int]:
    """Return one non-negative dimension per tensor."""
    dims = [value] * len(tensors) if isinstance(value, int) else list(value)
    if len(dims) != len(tensors):
        raise KernelError(f"{name} has {len(dims)} entries for {len(tensors)} tensors")
    for dim, tensor in zip(dims, tensors, strict=True):
        if not -tensor.dim() <= dim < tensor.dim():
            raise KernelError(f"{name}={dim} is not a dimension of {tuple(tensor.shape)}")
    return [dim % tensor.dim() for dim, tensor in zip(dims, tensors, strict=True)]
