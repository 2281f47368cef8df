"""Similarity of every token of a video with nearby tokens of the previous frame."""

import torch
from tokencomp.kernels import checks, dispatch
from tokencomp.kernels.nearest_previous_frame import naive
from torch import Tensor

MAX_RADIUS = 3


def nearest_previous_frame(x: Tensor, radius: int = 0) -> tuple[Tensor, Tensor]:
    """Find the most similar nearby token in the previous frame for every token.

    Parameters
    ----------
    x
        Features of a video, ``(T, H, W, D)``.
    radius
        Half the side of the square window around the token's own place, at most 3. A radius of 0
        compares the same place only, as efficient video sampling does (arXiv 2510.14624).

    Returns
    -------
    similarity : Tensor
        Cosine with the most similar token, fp32 ``(T, H, W)`` (fp64 for fp64 features); -inf in
        frame 0, which has no predecessor.
    index : Tensor
        Raster index of that token in the previous frame, int64 ``(T, H, W)``, the lowest of equally
        similar ones; -1 in frame 0.

    Raises
    ------
    KernelError
        If the shape, the dtype or the radius is wrong, or if features are NaN or infinite.

    Notes
    -----
    The cost is ``6·T·H·W·D·(2·radius + 1)²`` FLOPs and ``T·H·W·(D·itemsize + 12)`` bytes; each
    frame is read again as predecessor, but from the cache. A zero row has cosine 0 with every row.
    """
    checks.shape("x", x, 4, "(T, H, W, D)")
    checks.floating("x", x)
    checks.count("radius", radius, 0, MAX_RADIUS)
    checks.int32_sizes(tokens=x.shape[0] * x.shape[1] * x.shape[2])
    similarity, index = _op(x.detach(), radius)
    return similarity, index


@dispatch.custom_op("nearest_previous_frame")
def _op(x: Tensor, radius: int) -> tuple[Tensor, Tensor]:
    if dispatch.which(x) == "naive":
        similarity, index = naive.nearest_previous_frame(x, radius)
    else:
        from tokencomp.kernels.nearest_previous_frame import triton

        checks.triton_dtype("x", x)
        with dispatch.on_device(x):
            similarity, index = triton.nearest_previous_frame(x.contiguous(), radius)
    checks.holds(~similarity.isnan().any(), "x has NaN or infinite features: cosine is undefined")
    return similarity, index


@_op.register_fake
def _(x: Tensor, radius: int) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty(x.shape[:3], dtype=dtype), x.new_empty(x.shape[:3], dtype=torch.int64)
