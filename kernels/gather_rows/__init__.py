"""One index compacts everything that has a sequence axis."""

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
) -> list[Tensor]:
    r"""Gather the same rows from hidden states, cos/sin, masks, positions and KV in one launch.

    .. math:: out_{b, m} = x_{b, index_{b, m}}, \quad 0 \text{ where } index_{b, m} < 0

    Parameters
    ----------
    tensors
        Any shapes and dtypes (bool included), each with a batch and a sequence dimension:
        ``(B, N, D)`` hidden states, ``(B, N)`` masks, ``(3, B, N)`` M-RoPE positions,
        ``(B, H, N, D)`` keys. N may differ between tensors. A batch of 1 is shared by all samples.
    index
        int ``(B, M)``: row of each output row, negative for padding (ragged left-pad).
    seq_dims, batch_dims
        Sequence and batch dimension of all tensors (int) or of each; may be negative.

    Returns
    -------
    list of Tensor
        As given, with B and M in place of the batch and sequence sizes; contiguous.

    Raises
    ------
    KernelError
        On indices past a tensor's rows, dimensions that do not fit, or mixed devices.

    Notes
    -----
    No FLOPs; bytes ``2 · Σ B·M·row_bytes``. Differentiable (through PyTorch; the Triton kernel
    runs when no gradient is asked for).
    """
    tensors = list(tensors)
    checks.integer("index", index)
    checks.shape("index", index, 2, "(B, M)")
    seqs = _dims("seq_dims", seq_dims, tensors)
    batches = _dims("batch_dims", batch_dims, tensors)
    rows = []
    for tensor, seq, batch in zip(tensors, seqs, batches, strict=True):
        if tensor.dtype not in DTYPES:
            raise KernelError(f"gather_rows does not move {tensor.dtype}")
        checks.same_device(index=index, tensor=tensor)
        if seq == batch or tensor.shape[batch] not in (1, len(index)):
            raise KernelError(
                f"tensor {tuple(tensor.shape)}: batch dimension {batch} must hold {len(index)} "
                f"samples (or 1), and the sequence dimension ({seq}) must be another one"
            )
        rows.append(tensor.shape[seq])
        written = index.numel()
        for dim in range(max(seq, batch)):
            written *= 1 if dim in (seq, batch) else tensor.shape[dim]
        checks.int32_sizes(rows=tensor.shape[seq], rows_written=written)
    if not tensors:
        return []
    index = index.long()
    if checks.needs_grad(*tensors):
        return naive.gather_rows(tensors, index, seqs, batches)
    return _op(tensors, index, seqs, batches, min(rows))


@dispatch.custom_op("gather_rows")
def _op(
    tensors: list[Tensor], index: Tensor, seq_dims: list[int], batch_dims: list[int], limit: int
) -> list[Tensor]:
    if index.numel():
        message = f"index has entries past the last row ({limit - 1} of the shortest tensor)"
        checks.holds(index.amax() < limit, message)
    if dispatch.which(index) == "naive":
        return naive.gather_rows(tensors, index, seq_dims, batch_dims)
    from tokencomp.kernels.gather_rows import triton

    with dispatch.on_device(index):
        return triton.gather_rows(tensors, index.contiguous(), seq_dims, batch_dims)


@_op.register_fake
def _(
    tensors: list[Tensor], index: Tensor, seq_dims: list[int], batch_dims: list[int], limit: int
) -> list[Tensor]:
    out = []
    for tensor, seq, batch in zip(tensors, seq_dims, batch_dims, strict=True):
        shape = list(tensor.shape)
        shape[batch], shape[seq] = index.shape
        out.append(tensor.new_empty(shape))
    return out


def _dims(name: str, value: int | Sequence[int], tensors: list[Tensor]) -> list[int]:
    """One non-negative dimension per tensor."""
    dims = [value] * len(tensors) if isinstance(value, int) else list(value)
    if len(dims) != len(tensors):
        raise KernelError(f"{name} has {len(dims)} entries for {len(tensors)} tensors")
    for dim, tensor in zip(dims, tensors, strict=True):
        if not -tensor.dim() <= dim < tensor.dim():
            raise KernelError(f"{name}={dim} is not a dimension of {tuple(tensor.shape)}")
    return [dim % tensor.dim() for dim, tensor in zip(dims, tensors, strict=True)]
