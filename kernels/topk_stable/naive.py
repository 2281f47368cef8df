"""Plain PyTorch version of :func:`tokencomp.kernels.topk_stable`."""

import numpy as np
import torch
from tokencomp.kernels.segments import starts
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


def topk_of_spans(scores: Tensor, counts: list[int], lengths: list[int]) -> Tensor:
    """`topk_stable` of every span of scores ``(n,)``: rows of all spans, ascending, in one tensor.

    All spans are sorted together: by score, and then stably by span.
    """
    if len(set(zip(lengths, counts, strict=True))) == 1:
        table = scores.view(len(lengths), lengths[0])
        first = torch.arange(0, len(scores), max(1, lengths[0]), device=scores.device)
        return (topk_stable(table, counts[0]) + first[: len(lengths), None]).flatten()
    owner = torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths)).to(scores.device)
    order = torch.sort(scores + 0.0, descending=True, stable=True).indices
    order = order[torch.sort(owner[order], stable=True).indices]
    best = [np.arange(begin, begin + k) for begin, k in zip(starts(lengths), counts, strict=True)]
    places = torch.from_numpy(np.concatenate(best)).to(scores.device)
    return torch.sort(order[places]).values
