"""Plain PyTorch version of :func:`tokencomp.kernels.nearest_previous_frame`."""

import torch
from tokencomp.kernels.bipartite_match.naive import normalise
from torch import Tensor


def nearest_previous_frame(x: Tensor, radius: int) -> tuple[Tensor, Tensor]:
    """Compare with one shifted product per offset of the window, frame by frame.

    Only two frames are held in fp32 at a time. Shapes are those of
    :func:`tokencomp.kernels.nearest_previous_frame`.
    """
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
                current_y, previous_y = _overlap(dy, height)
                current_x, previous_x = _overlap(dx, width)
                cosine = (current[current_y, current_x] * previous[previous_y, previous_x]).sum(-1)
                best = similarity[frame, current_y, current_x]
                # A comparison with NaN is False, but NaN features must reach the caller's check.
                better = (cosine > best) | cosine.isnan()
                best.copy_(torch.where(better, cosine, best))
                chosen = index[frame, current_y, current_x]
                chosen.copy_(torch.where(better, place[previous_y, previous_x], chosen))
        previous = current
    return similarity, index


def _overlap(shift: int, size: int) -> tuple[slice, slice]:
    """Return the slice of positions p with ``0 <= p + shift < size``, and that slice shifted."""
    first, last = max(0, -shift), max(0, min(size, size - shift))
    return slice(first, max(first, last)), slice(first + shift, max(first, last) + shift)
