"""Indices of the k largest scores in a defined order.

``torch.topk`` does not define which of several equal scores it returns, and its choice differs
between devices and versions. The kept tokens must not depend on that.
"""

from collections.abc import Sequence

import torch
from tokencomp.kernels import checks, dispatch, segments
from tokencomp.kernels.errors import KernelError
from tokencomp.kernels.topk_stable import naive
from torch import Tensor

# Longest span whose ranks are counted. Counting takes n² comparisons; longer spans are sorted.
LONGEST = 32768


def topk_stable(
    scores: Tensor, k: int | Sequence[int], *, spans: Sequence[int] | None = None
) -> Tensor:
    """Return the indices of the `k` largest scores in ascending order; ties go to the lower index.

    Parameters
    ----------
    scores
        Scores ``(..., n)`` of any real dtype, compared in fp32. Infinities are allowed, NaN is not.
    k
        How many indices to return, ``0 <= k <= n``; with `spans`, one number for all or one each.
    spans
        Lengths of spans that scores ``(n,)`` hold one after the other; the best of every span are
        returned. None means that every row of `scores` is one span.

    Returns
    -------
    Tensor
        Indices int64 ``(..., k)``, ascending along the last dimension. With `spans`, indices into
        `scores`, ascending, ``(Σ k,)``.

    Raises
    ------
    KernelError
        If `k` is out of range, a score is NaN, `scores` is complex or has no dimension, or the
        spans do not cover it.

    Notes
    -----
    The plain version sorts with ``torch.sort``, whose order is stable on every device: O(n log n)
    comparisons and about ``12 n`` bytes of workspace per row, in launches that grow with their
    length. The Triton version counts in n² comparisons how many scores are ahead of each, and
    takes two launches for all spans. Spans above 32768 rows are sorted.
    """
    if scores.dim() == 0 or scores.is_complex():
        raise KernelError(
            f"scores must be real, (..., n); got {scores.dtype} {tuple(scores.shape)}"
        )
    if spans is None and isinstance(k, int):
        checks.count("k", k, 0, scores.shape[-1])
        return _op(checks.plain(scores).float(), k)
    checks.shape("scores", scores, 1, "(n,)")
    lengths, counts = segments.spans_and_counts(k, spans, len(scores))
    if not len(scores):
        return scores.new_empty(0, dtype=torch.int64)
    return _spans_op(checks.plain(scores).float(), counts, lengths)


def _check_values(scores: Tensor) -> None:
    if dispatch.checks_enabled(scores):
        checks.holds(
            ~torch.isnan(scores).any(),
            "scores contain NaN: no order is defined. Check the features (or attention) they come "
            "from",
        )


def _counts_ranks(scores: Tensor, longest: int) -> bool:
    """Whether the Triton kernels run, for spans of up to `longest` rows."""
    return dispatch.which(scores) == "triton" and longest <= LONGEST


@dispatch.custom_op("topk_of_spans")
def _spans_op(scores: Tensor, counts: list[int], lengths: list[int]) -> Tensor:
    _check_values(scores)
    if not _counts_ranks(scores, max(lengths, default=0)):
        return naive.topk_of_spans(scores, counts, lengths)
    from tokencomp.kernels.topk_stable import triton

    checks.int32_sizes(scores=len(scores))
    with dispatch.on_device(scores):
        return triton.topk_of_spans(scores.contiguous(), counts, lengths)


@_spans_op.register_fake
def _(scores: Tensor, counts: list[int], lengths: list[int]) -> Tensor:
    return scores.new_empty(sum(counts), dtype=torch.int64)


@dispatch.custom_op("topk_stable")
def _op(scores: Tensor, k: int) -> Tensor:
    _check_values(scores)
    if not _counts_ranks(scores, scores.shape[-1]):
        return naive.topk_stable(scores, k)
    from tokencomp.kernels.topk_stable import triton

    checks.int32_sizes(scores=scores.numel())
    with dispatch.on_device(scores):
        return triton.topk_stable(scores.contiguous(), k)


@_op.register_fake
def _(scores: Tensor, k: int) -> Tensor:
    return scores.new_empty((*scores.shape[:-1], k), dtype=torch.int64)
