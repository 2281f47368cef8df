"""Similarity of every token of a video with the same place of the previous frame."""

import torch
from tokencomp.kernels import checks, dispatch
from tokencomp.kernels.nearest_previous_frame import naive
from torch import Tensor


def nearest_previous_frame(x: Tensor) -> Tensor:
    """Compare every token with the token at the same place of the previous frame.

    Efficient video sampling keeps the tokens whose similarity is low (arXiv 2510.14624).

    Parameters
    ----------
    x
        Features of a video, ``(T, H, W, D)``.

    Returns
    -------
    Tensor
        Cosine with that token, fp32 ``(T, H, W)`` (fp64 for fp64 features); -inf in frame 0, which
        has no predecessor.

    Raises
    ------
    KernelError
        If the shape or the dtype is wrong, or if features are NaN or infinite.

    Notes
    -----
    The cost is ``6·T·H·W·D`` FLOPs and ``T·H·W·(D·itemsize + 4)`` bytes; each frame is read again
    as predecessor, but from the cache. A zero row has cosine 0 with every row.
    """
    checks.shape("x", x, 4, "(T, H, W, D)")
    checks.floating("x", x)
    checks.int32_sizes(tokens=x.shape[0] * x.shape[1] * x.shape[2])
    return _op(x.detach())


@dispatch.custom_op("nearest_previous_frame")
def _op(x: Tensor) -> Tensor:
    if dispatch.which(x) == "naive":
        similarity = naive.nearest_previous_frame(x)
    else:
        from tokencomp.kernels.nearest_previous_frame import triton

        checks.triton_dtype("x", x)
        with dispatch.on_device(x):
            similarity = triton.nearest_previous_frame(x.contiguous())
    checks.no_nan(similarity, "x has NaN or infinite features: cosine is undefined")
    return similarity


@_op.register_fake
def _(x: Tensor) -> Tensor:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty(x.shape[:3], dtype=dtype)
