"""Best partner of every even row among the odd rows of its frame, by cosine."""

from collections.abc import Sequence

import torch
from tokencomp.kernels import checks, dispatch, segments
from tokencomp.kernels.bipartite_match import naive
from torch import Tensor


def bipartite_match(
    x: Tensor, frames: int | Sequence[int] | Tensor | None = None
) -> tuple[Tensor, Tensor]:
    r"""Match every even row of a frame with its most similar odd row.

    .. math:: partner_a = \arg\max_{b \; odd} \frac{x_a \cdot x_b}{|x_a| |x_b|}

    Parameters
    ----------
    x
        ``(n, D)`` features, frames one after the other; even and odd count within the frame.
    frames
        Tokens per frame: an int (all frames alike), or one length per frame. None: one frame.

    Returns
    -------
    similarity : Tensor
        fp32 ``(n,)``, cosine with the best partner; -inf at odd rows and where a frame has none.
    partner : Tensor
        int64 ``(n,)``, row of the best partner in `x` (the lowest of equals); -1 likewise.

    Raises
    ------
    KernelError
        If the frames do not cover `x`, or features are NaN or infinite.

    Notes
    -----
    FLOPs ``n·N·D/2`` for frames of N tokens; bytes ``n·D·itemsize + 12·n``: normalisation and
    maximum are fused, no similarity matrix is stored. A zero row has cosine 0 with everything.
    Source: bipartite soft matching, ToMe (arXiv 2210.09461).
    """
    checks.shape("x", x, 2, "(n, D)")
    checks.floating("x", x)
    checks.int32_sizes(n=len(x))
    similarity, partner = _op(x.detach(), segments.lengths_of("frames", frames, len(x)))
    return similarity, partner


@dispatch.custom_op("bipartite_match")
def _op(x: Tensor, lengths: list[int]) -> tuple[Tensor, Tensor]:
    if dispatch.which(x) == "naive":
        similarity, partner = naive.bipartite_match(x, lengths)
    else:
        from tokencomp.kernels.bipartite_match import triton

        checks.triton_dtype("x", x)
        checks.grid_size("tiles of a frame", max(lengths, default=0) // 64)
        with dispatch.on_device(x):
            similarity, partner = triton.bipartite_match(checks.rows_contiguous(x), lengths)
    checks.holds(~similarity.isnan().any(), "x has NaN or infinite features: cosine is undefined")
    return similarity, partner


@_op.register_fake
def _(x: Tensor, lengths: list[int]) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty(len(x), dtype=dtype), x.new_empty(len(x), dtype=torch.int64)
