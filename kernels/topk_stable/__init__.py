"""Indices of the k largest scores in a defined order.

``torch.topk`` does not define which of several equal scores it returns, and its choice differs
between devices and versions. The kept tokens must not depend on that.
"""

from collections.abc import Sequence

import torch
from tokencomp.kernels import checks, dispatch
from tokencomp.kernels.errors import KernelError
from tokencomp.kernels.topk_stable import naive
from torch import Tensor


def topk_stable(
    scores: Tensor, k: int | Sequence[int], *, spans: int | Sequence[int] | None = None
) -> Tensor:
    """Return the indices of the `k` largest scores of every span; ties go to the lower index.

    Parameters
    ----------
    scores
        Scores ``(n,)`` of any real dtype, spans one after the other, compared in fp32. Infinities
        are allowed, NaN is not.
    k
        How many indices to return of every span (int) or of each (sequence), from 0 to its length.
    spans
        Scores per span, as an int for equal spans or as one length per span. None means one span.

    Returns
    -------
    Tensor
        Indices into `scores`, ascending, int64 ``(Σ k,)``.

    Raises
    ------
    KernelError
        If `k` is out of range, a score is NaN, `scores` is complex or not ``(n,)``, or the spans do
        not cover it.

    Notes
    -----
    The plain version sorts with ``torch.sort``, whose order is stable on every device: O(n log n)
    comparisons and about ``12 n`` bytes of workspace per row, in launches that grow with their
    length. The Triton version counts in n² comparisons how many scores are ahead of each, and
    takes two launches for all spans. Spans above 32768 rows are sorted.
    """
    checks.operand("scores", scores, "(n,)", dtypes=None)
    if scores.is_complex():
        raise KernelError(f"scores must be real; got {scores.dtype}")
    lengths, counts = checks.spans_and_counts(k, spans, len(scores))
    if not len(scores):
        return scores.new_empty(0, dtype=torch.int64)
    return _op(scores.float(), counts, lengths)


_op = dispatch.Op(
    naive.topk_stable,
    checks.fake_choice,
    lambda scores, *_: checks.no_nan(
        scores, "scores contain NaN: no order is defined. Check the features they come from"
    ),
)
