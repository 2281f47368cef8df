"""Plain PyTorch version of :func:`tokencomp.kernels.merge_rows` (differentiable in `x`)."""

import torch
from torch import Tensor


def merge_rows(
    x: Tensor,
    target: Tensor,
    keep: Tensor,
    sizes: Tensor | None,
    weighted: bool,
    lengths: list[int],
) -> tuple[Tensor, Tensor]:
    """Add rows to the kept rows in row order, so that sums do not depend on scheduling.

    Shapes are those of :func:`tokencomp.kernels.merge_rows`; the `lengths` of the frames narrow the
    search of the Triton form only.
    """
    count = len(keep)
    slot = torch.full((len(x) + 1,), -1, dtype=torch.int64, device=x.device)
    slot[keep] = torch.arange(count, device=x.device)
    slot = slot[target]  # a target of -1 reads the extra last entry, which means dropped
    members = (slot >= 0).nonzero().squeeze(1)
    slot = slot[members]
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    ones = torch.ones(len(members), dtype=dtype, device=x.device)
    size = ones if sizes is None else sizes[members].to(dtype)
    weight = size if weighted else ones
    total = x.new_zeros(count, dtype=dtype).index_add(0, slot, weight)
    merged = x.new_zeros(count, x.shape[1], dtype=dtype)
    merged = merged.index_add(0, slot, x[members].to(dtype) * weight[:, None]) / total[:, None]
    new_sizes = total if weighted else total.new_zeros(count).index_add(0, slot, size)
    return merged.to(x.dtype), new_sizes
