"""Pooling of video frames, each to a separate grid."""

from collections.abc import Sequence

from tokencomp.kernels import checks, dispatch
from tokencomp.kernels.errors import KernelError
from tokencomp.kernels.frame_pool import naive
from torch import Tensor


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


_op = dispatch.Op(naive.frame_pool, _fake, differentiable=True)
