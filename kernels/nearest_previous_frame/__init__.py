"""Similarity of every token of a video with the same place of the previous frame."""

import torch
from tokencomp.kernels.bipartite_match import normalise
from torch import Tensor

from tokencomp.kernels import checks, dispatch


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
    checks.operand("x", x, "(T, H, W, D)")
    return _op(x)


def naive(x: Tensor) -> Tensor:
    """Compare frame by frame, so that only two frames are held in fp32 at a time."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    similarity = torch.full(x.shape[:3], -torch.inf, dtype=dtype, device=x.device)
    previous = normalise(x[0].to(dtype)) if len(x) else x
    for frame in range(1, len(x)):
        current = normalise(x[frame].to(dtype))
        similarity[frame] = (current * previous).sum(-1)
        previous = current
    return similarity


_op = dispatch.Op(
    "nearest_previous_frame",
    naive,
    lambda x: x.new_empty(x.shape[:3], dtype=torch.promote_types(x.dtype, torch.float32)),
    check_result=checks.cosines,
)
