"""The most similar odd row of every even row of a frame, by cosine similarity."""

from collections.abc import Sequence

import torch
from tokencomp.kernels import checks, dispatch
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
        Features ``(n, D)``, frames one after the other. Even and odd count within the frame.
    frames
        Tokens per frame, as an int for equal frames or as one length per frame. None means that
        all rows are one frame.

    Returns
    -------
    similarity : Tensor
        Cosine with the best partner, fp32 ``(n,)`` (fp64 for fp64 features); -inf at odd rows and
        in frames that have no odd row.
    partner : Tensor
        Row of the best partner in `x`, int64 ``(n,)``, the lowest of equally good ones; -1 where
        `similarity` is -inf.

    Raises
    ------
    KernelError
        If the frames do not cover `x`, or features are NaN or infinite.

    Notes
    -----
    The cost is ``n·N·D/2`` FLOPs for frames of N tokens and ``n·D·itemsize + 12·n`` bytes:
    normalisation and maximum are fused, and no similarity matrix is stored. A zero row has cosine 0
    with every row. The method is the bipartite soft matching of ToMe (arXiv 2210.09461).
    """
    checks.operand("x", x, "(n, D)")
    return _op(x, checks.lengths_of("frames", frames, len(x)))


_op = dispatch.Op(
    naive.bipartite_match,
    lambda x, _: (
        x.new_empty(len(x), dtype=checks.sum_dtype(x)),
        x.new_empty(len(x), dtype=torch.int64),
    ),
    check_result=lambda result: checks.cosines(result[0]),
)
