"""Plain PyTorch version of :func:`tokencomp.kernels.topk_stable`."""

import numpy as np
import torch
from tokencomp.kernels.checks import starts
from torch import Tensor


def topk_stable(scores: Tensor, counts: list[int], lengths: list[int]) -> Tensor:
    """Sort stably, and return the first `counts` rows of every span in ascending order.

    `scores` is fp32 ``(n,)`` without NaN. Equal spans are the rows of a table; of others all are
    sorted together: by score, and then stably by span.
    """
    scores = scores + 0.0  # turns -0.0 into 0.0, so that the two tie
    if len(set(zip(lengths, counts, strict=True))) == 1:
        table = scores.view(len(lengths), lengths[0])
        order = torch.sort(table, dim=1, descending=True, stable=True).indices[:, : counts[0]]
        first = torch.arange(0, len(scores), lengths[0], device=scores.device)
        return (torch.sort(order, dim=1).values + first[:, None]).flatten()
    owner = torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths)).to(scores.device)
    order = torch.sort(scores, descending=True, stable=True).indices
    order = order[torch.sort(owner[order], stable=True).indices]
    best = [np.arange(begin, begin + k) for begin, k in zip(starts(lengths), counts, strict=True)]
    places = torch.from_numpy(np.concatenate(best)).to(scores.device)
    return torch.sort(order[places]).values
