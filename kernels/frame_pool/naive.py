"""Plain PyTorch version of :func:`tokencomp.kernels.frame_pool` (differentiable)."""

import torch
import torch.nn.functional as F
from torch import Tensor


def frame_pool(x: Tensor, heights: list[int], widths: list[int], mode: str) -> Tensor:
    """Pool all frames that have the same output grid in one call.

    `x` is ``(T, H, W, D)``, `heights` and `widths` have T entries, and the result is ``(Σ h·w, D)``
    in the order of the frames.
    """
    frames, _, _, dim = x.shape
    grids: dict[tuple[int, int], list[int]] = {}
    for frame, grid in enumerate(zip(heights, widths, strict=True)):
        grids.setdefault(grid, []).append(frame)
    parts: list[Tensor] = [x.new_empty(0, dim)] * frames
    for grid, members in grids.items():
        pooled = x[members] if grid == tuple(x.shape[1:3]) else _resize(x[members], grid, mode)
        for frame, part in zip(members, pooled.flatten(1, 2).unbind(), strict=True):
            parts[frame] = part
    return torch.cat(parts) if parts else x.new_empty(0, dim)


def _resize(x: Tensor, grid: tuple[int, int], mode: str) -> Tensor:
    """Resize ``(F, H, W, D)`` to ``(F, *grid, D)``, computed in fp32 (fp64 for fp64 inputs)."""
    wide = x if x.dtype == torch.float64 else x.float()
    image = wide.permute(0, 3, 1, 2)
    if mode == "area":
        image = F.adaptive_avg_pool2d(image, grid)
    else:
        image = F.interpolate(image, size=grid, mode="bilinear", align_corners=False)
    return image.permute(0, 2, 3, 1).to(x.dtype)
