"""Plain PyTorch version of :func:`tokencomp.kernels.nearest_previous_frame`."""

import torch
from tokencomp.kernels.bipartite_match.naive import normalise
from torch import Tensor


def nearest_previous_frame(x: Tensor) -> Tensor:
    """Compare frame by frame, so that only two frames are held in fp32 at a time."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    similarity = torch.full(x.shape[:3], -torch.inf, dtype=dtype, device=x.device)
    previous = normalise(x[0].to(dtype)) if len(x) else x
    for frame in range(1, len(x)):
        current = normalise(x[frame].to(dtype))
        similarity[frame] = (current * previous).sum(-1)
        previous = current
    return similarity
