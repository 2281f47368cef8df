"""Plain PyTorch version of :func:`tokencomp.kernels.nearest_previous_frame`."""

import torch
from tokencomp.kernels.bipartite_match.naive import normalise
from torch import Tensor


def nearest_previous_frame(x: Tensor, radius: int) -> tuple[Tensor, Tensor]:
    """One shifted product per offset of the window, two frames in fp32 at a time."""
    frames, height, width, _ = x.shape
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    similarity = torch.full(x.shape[:3], -torch.inf, dtype=dtype, device=x.device)
    index = torch.full(x.shape[:3], -1, dtype=torch.int64, device=x.device)
    place = torch.arange(height * width, device=x.device).view(height, width)
    previous = normalise(x[0].to(dtype)) if frames else x
    for frame in range(1, frames):
        current = normalise(x[frame].to(dtype))
        for dy in range(-radius, radius + 1):
            for dx in range(-radius, radius + 1):
                here_y, there_y = _overlap(dy, height)
                here_x, there_x = _overlap(dx, width)
                cosine = (current[here_y, here_x] * previous[there_y, there_x]).sum(-1)
                best = similarity[frame, here_y, here_x]
                # NaN (bad features) must not be lost in the comparison.
                better = (cosine > best) | cosine.isnan()
                best.copy_(torch.where(better, cosine, best))
                chosen = index[frame, here_y, here_x]
                chosen.copy_(torch.where(better, place[there_y, there_x], chosen))
        previous = current
    return similarity, index


def _overlap(shift: int, size: int) -> tuple[slice, slice]:
    """Positions p with ``0 <= p + shift < size``, and those positions shifted."""
    first, last = max(0, -shift), max(0, min(size, size - shift))
    return slice(first, max(first, last)), slice(first + shift, max(first, last) + shift)
