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
    index = index.long()
    if checks.needs_grad(*tensors):
        return naive.gather_rows(tensors, index, seqs, batches)
    return _op(tensors, index, seqs, batches, limit)


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


@dispatch.custom_op("gather_rows")
def _op(
    tensors: list[Tensor],
    index: Tensor,
    seq_dims: list[int],
    batch_dims: list[int],
    limit: int | None,
) -> list[Tensor]:
    if limit is not None and index.numel():
        message = f"index has entries past the last row ({limit - 1} of the shortest tensor)"
        checks.holds(index.amax() < limit, message)
    if dispatch.which(index) == "naive":
        return naive.gather_rows(tensors, index, seq_dims, batch_dims)
    from tokencomp.kernels.gather_rows import triton

    with dispatch.on_device(index):
        return triton.gather_rows(tensors, index.contiguous(), seq_dims, batch_dims)


@_op.register_fake
def _(
    tensors: list[Tensor],
    index: Tensor,
    seq_dims: list[int],
    batch_dims: list[int],
    limit: int | None,
) -> list[Tensor]:
    out = []
    for tensor, seq, batch in zip(tensors, seq_dims, batch_dims, strict=True):
        shape = list(tensor.shape)
        shape[batch], shape[seq] = index.shape
        out.append(tensor.new_empty(shape))
    return out


def _dims(name: str, value: int | Sequence[int], tensors: list[Tensor]) -> list[int]:
    """Return one non-negative dimension per tensor."""
    dims = [value] * len(tensors) if isinstance(value, int) else list(value)
    if len(dims) != len(tensors):
        raise KernelError(f"{name} has {len(dims)} entries for {len(tensors)} tensors")
    for dim, tensor in zip(dims, tensors, strict=True):
        if not -tensor.dim() <= dim < tensor.dim():
            raise KernelError(f"{name}={dim} is not a dimension of {tuple(tensor.shape)}")
    return [dim % tensor.dim() for dim, tensor in zip(dims, tensors, strict=True)]
