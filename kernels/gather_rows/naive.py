"""Plain PyTorch version of :func:`tokencomp.kernels.gather_rows` (differentiable)."""

import torch
from torch import Tensor


def gather_rows(
    index: Tensor, tensors: list[Tensor], seqs: list[int], batches: list[int], limit: int | None
) -> list[Tensor]:
    """Gather with one ``index_select`` (batch of one) or one ``gather`` per tensor.

    `index` is int64 ``(B, M)``; the dimensions are non-negative, one per tensor. `limit`, which
    the indices are below, serves their check.
    """
    padding = index < 0
    source = index.clamp(min=0)
    padded = bool(padding.any())
    out = []
    for tensor, seq, batch in zip(tensors, seqs, batches, strict=True):
        shape = [1] * tensor.dim()
        shape[seq], shape[batch] = index.shape[1], index.shape[0]
        if index.shape[0] == 1:
            rows = tensor.index_select(seq, source[0])
        else:
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
