"""Plain PyTorch version of :func:`tokencomp.kernels.frame_pool` (differentiable)."""

import torch
from tokencomp.kernels.checks import same_shape
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d


def frame_pool(x: Tensor, heights: list[int], widths: list[int]) -> Tensor:
    """Pool all frames that have the same output grid in one call.

    `x` is ``(T, H, W, D)``, `heights` and `widths` have T entries, and the result is ``(Σ h·w, D)``
    in the order of the frames.
    """
    frames, _, _, dim = x.shape
    parts: list[Tensor] = [x.new_empty(0, dim)] * frames
    for grid, members in same_shape(heights, widths).items():
        pooled = x[members] if grid == tuple(x.shape[1:3]) else _resize(x[members], grid)
        for frame, part in zip(members, pooled.flatten(1, 2).unbind(), strict=True):
            parts[frame] = part
    return torch.cat(parts) if parts else x.new_empty(0, dim)


def _resize(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """Resize ``(F, H, W, D)`` to ``(F, *grid, D)``, computed in fp32 (fp64 for fp64 inputs)."""
    wide = x if x.dtype == torch.float64 else x.float()
    return adaptive_avg_pool2d(wide.permute(0, 3, 1, 2), grid).permute(0, 2, 3, 1).to(x.dtype)
