"""Plain PyTorch version of :func:`tokencomp.kernels.ccam_attention` (differentiable)."""

import torch
import torch.nn.functional as F
from tokencomp.kernels.ccam_attention.rule import runs
from torch import Tensor


def ccam_attention(
    q: Tensor, k: Tensor, v: Tensor, frames: int, per_frame: int, causal: bool, scale: float
) -> Tensor:
    """Attend with one call of SDPA, without a mask, per group of queries that see the same frames.

    Shapes are those of :func:`tokencomp.kernels.ccam_attention`, and `per_frame`, above 0, is the
    number of keys of a frame.
    """
    queries, parts = q.shape[2], []
    for first, end, seen in runs(queries, frames) if causal else [(0, queries, frames)]:
        keys = seen * per_frame
        parts.append(
            F.scaled_dot_product_attention(
                q[:, :, first:end], k[:, :, :keys], v[:, :, :keys], scale=scale
            )
        )
    return torch.cat(parts, dim=2).contiguous()
