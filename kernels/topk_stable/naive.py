"""Plain PyTorch version of :func:`tokencomp.kernels.topk_stable`."""

import torch
from torch import Tensor


def topk_stable(scores: Tensor, k: int) -> Tensor:
    """Sort stably, take the first `k` and return their indices in ascending order, ``(..., k)``.

    `scores` is fp32 ``(..., n)`` without NaN.
    """
    if k == scores.shape[-1]:
        order = torch.arange(k, device=scores.device)
        return order.expand(*scores.shape[:-1], k).clone()
    # Adding 0.0 turns -0.0 into 0.0, so that the two tie.
    order = torch.sort(scores + 0.0, dim=-1, descending=True, stable=True).indices
    return torch.sort(order[..., :k], dim=-1).values
