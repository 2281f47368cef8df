"""Plain PyTorch version of :func:`tokencomp.kernels.ccam_attention` (differentiable)."""

import torch
import torch.nn.functional as F
from tokencomp.kernels.ccam_attention.rule import runs
from torch import Tensor


def ccam_attention(
    q: Tensor, k: Tensor, v: Tensor, frames: list[int], per_frame: int, causal: bool, scale: float
) -> Tensor:
    """Attend with one call of SDPA, without a mask, per group of queries that see the same frames.

    Shapes are those of :func:`tokencomp.kernels.ccam_attention`; `frames` has one count per sample
    and `per_frame` is the number of keys of a frame.
    """
    if len(set(frames)) == 1:
        return _attend(q, k, v, frames[0], per_frame, causal, scale)
    parts = [
        _attend(q[b : b + 1], k[b : b + 1], v[b : b + 1], count, per_frame, causal, scale)
        for b, count in enumerate(frames)
    ]
    return torch.cat(parts)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, frames: int, per_frame: int, causal: bool, scale: float
) -> Tensor:
    """Attention of samples that have the same number of frames."""
    queries = q.shape[2]
    if frames == 0:
        return torch.zeros_like(q)
    parts = []
    for first, end, seen in runs(queries, frames) if causal else [(0, queries, frames)]:
        keys = seen * per_frame
        parts.append(
            F.scaled_dot_product_attention(
                q[:, :, first:end], k[:, :, :keys], v[:, :, :keys], scale=scale
            )
        )
    return torch.cat(parts, dim=2)
