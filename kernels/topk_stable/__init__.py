"""Indices of the k largest scores in a defined order.

``torch.topk`` does not define which of several equal scores it returns, and its choice differs
between devices and versions. The kept tokens must not depend on that.
"""

import torch
from tokencomp.kernels import checks, dispatch
from tokencomp.kernels.errors import KernelError
from tokencomp.kernels.topk_stable import naive
from torch import Tensor


def topk_stable(scores: Tensor, k: int) -> Tensor:
    """Return the indices of the `k` largest scores in ascending order; ties go to the lower index.

    Parameters
    ----------
    scores
        Scores ``(..., n)`` of any real dtype, compared in fp32. Infinities are allowed, NaN is not.
    k
        How many indices to return, ``0 <= k <= n``.

    Returns
    -------
    Tensor
        Indices int64 ``(..., k)``, ascending along the last dimension.

    Raises
    ------
    KernelError
        If `k` is out of range, a score is NaN, or `scores` is complex or has no dimension.

    Notes
    -----
    ``torch.sort`` guarantees a stable order on every device, so no Triton kernel is needed. It
    costs O(n log n) comparisons and about ``12 n`` bytes of workspace per row.
    """
    if scores.dim() == 0 or scores.is_complex():
        raise KernelError(
            f"scores must be real, (..., n); got {scores.dtype} {tuple(scores.shape)}"
        )
    checks.count("k", k, 0, scores.shape[-1])
    return _op(scores.detach().float(), k)


@dispatch.custom_op("topk_stable")
def _op(scores: Tensor, k: int) -> Tensor:
    checks.holds(
        ~torch.isnan(scores).any(),
        "scores contain NaN: no order is defined. Check the features (or attention) they come from",
    )
    return naive.topk_stable(scores, k)


@_op.register_fake
def _(scores: Tensor, k: int) -> Tensor:
    return scores.new_empty((*scores.shape[:-1], k), dtype=torch.int64)
