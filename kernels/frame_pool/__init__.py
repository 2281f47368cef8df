"""Pooling of video frames to a different grid each."""

from collections.abc import Sequence

from tokencomp.kernels import checks, dispatch
from tokencomp.kernels.errors import KernelError
from tokencomp.kernels.frame_pool import naive
from torch import Tensor

MODES = ("area", "bilinear")


def frame_pool(x: Tensor, grids: Sequence[tuple[int, int]], mode: str = "area") -> Tensor:
    r"""Pool every frame to its own grid, all frames in one launch.

    ``"area"``: output cell (i, j) of a ``(h, w)`` grid is the mean over the input rows
    ``floor(i·H/h) … ceil((i+1)·H/h) - 1`` and columns likewise (adaptive average pooling; plain
    average pooling where h divides H). ``"bilinear"``: interpolation between the four nearest cell
    centres, edges clamped (as ``interpolate(align_corners=False)``, the pooling of
    LLaVA-OneVision).

    Parameters
    ----------
    x
        ``(T, H, W, D)`` features, any strides with a contiguous last dimension (else copied).
    grids
        Output ``(h, w)`` per frame; ``(H, W)`` leaves a frame as it is, to the bit.
    mode
        ``"area"`` or ``"bilinear"``.

    Returns
    -------
    Tensor
        ``(Σ h·w, D)`` in the dtype of `x`, frames one after the other, raster order; computed in
        fp32.

    Raises
    ------
    KernelError
        If a grid is missing, empty or larger than the frame.

    Notes
    -----
    FLOPs about ``T·H·W·D`` (area) or ``7·n·D`` (bilinear) for n output tokens; bytes
    ``(T·H·W + n)·D·itemsize``. Differentiable (through PyTorch; the Triton kernel runs when no
    gradient is asked for). Progressive pooling of frame groups: arXiv 2409.20018.
    """
    checks.shape("x", x, 4, "(T, H, W, D)")
    checks.floating("x", x)
    checks.choice("mode", mode, MODES)
    frames, height, width, _ = x.shape
    if len(grids) != frames:
        raise KernelError(f"{len(grids)} grids for {frames} frames: give one (h, w) per frame")
    heights, widths = [int(h) for h, _ in grids], [int(w) for _, w in grids]
    for h, w in set(zip(heights, widths, strict=True)):
        if not (1 <= h <= height and 1 <= w <= width):
            raise KernelError(f"grid ({h}, {w}) must be within (1, 1) and ({height}, {width})")
    checks.int32_sizes(tokens=frames * height * width)
    if checks.needs_grad(x):
        return naive.frame_pool(x, heights, widths, mode)
    return _op(x, heights, widths, mode)


@dispatch.custom_op("frame_pool")
def _op(x: Tensor, heights: list[int], widths: list[int], mode: str) -> Tensor:
    if dispatch.which(x) == "naive":
        return naive.frame_pool(x, heights, widths, mode)
    from tokencomp.kernels.frame_pool import triton

    checks.triton_dtype("x", x)
    with dispatch.on_device(x):
        return triton.frame_pool(checks.rows_contiguous(x), heights, widths, mode)


@_op.register_fake
def _(x: Tensor, heights: list[int], widths: list[int], mode: str) -> Tensor:
    tokens = sum(h * w for h, w in zip(heights, widths, strict=True))
    return x.new_empty(tokens, x.shape[3])
