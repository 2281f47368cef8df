"""Gathering with one index from all tensors that have a sequence axis."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tokencomp.kernels import checks, dispatch
from tokencomp.kernels.errors import KernelError

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
    seqs, batches = (
        [value] * len(tensors) if isinstance(value, int) else list(value)
        for value in (seq_dims, batch_dims)
    )
    limit = None if trusted else _check(tensors, index, seqs, batches)
    if not tensors:
        return []
    seqs, batches = (
        [dim % tensor.dim() for dim, tensor in zip(dims, tensors, strict=True)]
        for dims in (seqs, batches)
    )
    return _op(index.long(), tensors, seqs, batches, limit, trusted=trusted)


def _check(tensors: list[Tensor], index: Tensor, seqs: list[int], batches: list[int]) -> int | None:
    """Check all but the values of `index`, and return what they must be below."""
    checks.operand("index", index, "(B, M)", checks.INTEGERS)
    checks.same_device(index=index, **{f"tensor {i}": t for i, t in enumerate(tensors)})
    if not len(seqs) == len(batches) == len(tensors):
        raise KernelError(
            f"seq_dims has {len(seqs)} and batch_dims {len(batches)} entries for {len(tensors)} "
            "tensors"
        )
    rows, written = [], []
    for tensor, seq, batch in zip(tensors, seqs, batches, strict=True):
        shape, dims = tuple(tensor.shape), range(-tensor.dim(), tensor.dim())
        if tensor.dtype not in DTYPES:
            raise KernelError(f"gather_rows does not move {tensor.dtype}")
        if seq not in dims or batch not in dims:
            raise KernelError(f"seq_dims={seq}, batch_dims={batch}: no dimensions of {shape}")
        low, high = sorted((seq % len(shape), batch % len(shape)))
        if low == high or shape[batch] not in (1, len(index)):
            raise KernelError(
                f"tensor {shape}: batch dimension {batch} must hold {len(index)} samples (or 1), "
                f"and the sequence dimension ({seq}) must be another one"
            )
        rows.append(shape[seq])
        # Rows of the result, which the kernel counts in 32 bits: samples, M and leading dimensions.
        written.append(index.numel() * math.prod(shape[:low] + shape[low + 1 : high]))
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


def naive(
    index: Tensor, tensors: list[Tensor], seqs: list[int], batches: list[int], limit: int | None
) -> list[Tensor]:
    """Gather with one ``index_select`` (batch of one) or one ``gather`` per tensor.

    `index` is int64 ``(B, M)``; the dimensions are non-negative, one per tensor. `limit`, which
    the indices are below, serves their check.
    """
    padding = index < 0
    # Padding rows read row 0 first, and are set to 0 after the copy.
    source = index.clamp(min=0)
    padded = bool(padding.any())
    out = []
    for tensor, seq, batch in zip(tensors, seqs, batches, strict=True):
        shape = [1] * tensor.dim()
        shape[seq], shape[batch] = index.shape[1], index.shape[0]
        if not tensor.shape[seq]:
            # The sum over no rows is a row of zeros, which the padding rows can read.
            tensor = tensor.sum(seq, keepdim=True, dtype=tensor.dtype)
        if index.shape[0] == 1:
            rows = tensor.index_select(seq, source[0])
        else:
            # An index of the full shape: for keys (B, H, N, D) it is (B, H, M, D), expanded.
            full = list(tensor.shape)
            full[seq], full[batch] = shape[seq], shape[batch]
            wide = list(tensor.shape)
            wide[batch] = index.shape[0]
            at = _oriented(source, shape, seq, batch).expand(full)
            rows = torch.gather(tensor.expand(wide), seq, at)
        if padded:
            rows = rows.masked_fill(_oriented(padding, shape, seq, batch), 0)
        out.append(rows.contiguous())
    return out


def _oriented(index: Tensor, shape: list[int], seq: int, batch: int) -> Tensor:
    """Lay ``(B, M)`` out along the batch and sequence dimensions of a tensor."""
    return (index if batch < seq else index.T).reshape(shape)


_op = dispatch.Op("gather_rows", naive, _fake, _check_values, differentiable=True)
