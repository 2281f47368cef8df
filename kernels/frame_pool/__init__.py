"""Pooling of video frames, each to a separate grid."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from tokencomp.kernels import checks, dispatch
from tokencomp.kernels.errors import KernelError


def frame_pool(x: Tensor, grids: Sequence[tuple[int, int]]) -> Tensor:
    r"""Pool every frame to its own grid, all frames in one launch.

    Output cell (i, j) of a ``(h, w)`` grid is the mean over the input rows
    ``floor(i·H/h) … ceil((i+1)·H/h) - 1`` and over the columns by the same rule. This is adaptive
    average pooling, or plain average pooling where h divides H.

    Parameters
    ----------
    x
        Features ``(T, H, W, D)`` of a floating dtype. Strides are free as long as the last
        dimension is contiguous; otherwise the features are copied.
    grids
        Output grid ``(h, w)`` of every frame. ``(H, W)`` returns a frame bit for bit.

    Returns
    -------
    Tensor
        Pooled features ``(Σ h·w, D)`` in the dtype of `x`, frames one after the other in raster
        order, computed in fp32.

    Raises
    ------
    KernelError
        If a grid is missing, empty or larger than the frame, or if `x` has a wrong shape or dtype.

    Notes
    -----
    The cost is about ``T·H·W·D`` FLOPs and ``(T·H·W + n)·D·itemsize`` bytes for n output tokens.
    The function is differentiable: if a gradient is needed, PyTorch runs instead of the Triton
    kernel. Progressive pooling of frame groups is the method of arXiv 2409.20018.
    """
    checks.operand("x", x, "(T, H, W, D)")
    frames, height, width, _ = x.shape
    if len(grids) != frames:
        raise KernelError(f"{len(grids)} grids for {frames} frames: give one (h, w) per frame")
    heights, widths = [int(h) for h, _ in grids], [int(w) for _, w in grids]
    for h, w in set(zip(heights, widths, strict=True)):
        if not (1 <= h <= height and 1 <= w <= width):
            raise KernelError(f"grid ({h}, {w}) must be within (1, 1) and ({height}, {width})")
    return _op(x, heights, widths)


def _fake(x: Tensor, heights: list[int], widths: list[int]) -> Tensor:
    tokens = sum(h * w for h, w in zip(heights, widths, strict=True))
    return x.new_empty(tokens, x.shape[3])


# 5 rows to 2 cells, floor(i · 5/2) … ceil((i + 1) · 5/2) - 1: rows 0-2 and 2-4, which share row 2.
# 4 rows to 2 cells: rows 0-1 and 2-3, plain average pooling.
def naive(x: Tensor, heights: list[int], widths: list[int]) -> Tensor:
    """Pool all frames that have the same output grid in one call.

    `x` is ``(T, H, W, D)``, `heights` and `widths` have T entries, and the result is ``(Σ h·w, D)``
    in the order of the frames.
    """
    frames, _, _, dim = x.shape
    parts: list[Tensor] = [x.new_empty(0, dim)] * frames
    grids = [*zip(heights, widths, strict=True)]
    for grid in dict.fromkeys(grids):
        members = [frame for frame, other in enumerate(grids) if other == grid]
        # (frames of this grid, h, w, D). Frames at full size are copied, so no bit changes.
        pooled = x[members] if grid == tuple(x.shape[1:3]) else _resize(x[members], grid)
        for frame, part in zip(members, pooled.flatten(1, 2).unbind(), strict=True):
            parts[frame] = part
    return torch.cat(parts) if parts else x.new_empty(0, dim)


def _resize(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """Resize ``(F, H, W, D)`` to ``(F, *grid, D)``, computed in fp32 (fp64 for fp64 inputs)."""
    wide = x if x.dtype == torch.float64 else x.float()
    return adaptive_avg_pool2d(wide.permute(0, 3, 1, 2), grid).permute(0, 2, 3, 1).to(x.dtype)


_op = dispatch.Op("frame_pool", naive, _fake, differentiable=True)
