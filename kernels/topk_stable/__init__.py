"""Indices of the k largest scores in a defined order.

``torch.topk`` does not define which of several equal scores it returns, and its choice differs
between devices and versions. The kept tokens must not depend on that.
"""

from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
from torch import Tensor

from tokencomp.kernels import checks, dispatch
from tokencomp.kernels.errors import KernelError


def topk_stable(
    scores: Tensor,
    k: int | Sequence[int],
    *,
    spans: int | Sequence[int] | None = None,
    trusted: bool = False,
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
    trusted
        Whether the caller knows that all arguments are right. Then `k` and `spans` are lists, and
        nothing is checked.

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
    if trusted:
        # Scores of a reducer, whose values were checked, with budgets and lengths from the host.
        counts, lengths = cast("list[int]", k), cast("list[int]", spans)
    else:
        checks.operand("scores", scores, "(n,)", dtypes=None)
        if scores.is_complex():
            raise KernelError(f"scores must be real; got {scores.dtype}")
        lengths, counts = checks.spans_and_counts(k, spans, len(scores))
    if not len(scores):
        return scores.new_empty(0, dtype=torch.int64)
    return _op(scores.float(), counts, lengths, trusted=trusted)


def naive(scores: Tensor, counts: list[int], lengths: list[int]) -> Tensor:
    """Sort stably, and return the first `counts` rows of every span in ascending order.

    `scores` is fp32 ``(n,)`` without NaN. Equal spans are the rows of a table; of others all are
    sorted together: by score, and then stably by span.
    """
    scores = scores + 0.0  # turns -0.0 into 0.0, so that the two tie
    # Frames of one video, or samples with one keep count: a batched sort of a table (spans, rows).
    if len(set(zip(lengths, counts, strict=True))) == 1:
        table = scores.view(len(lengths), lengths[0])
        order = torch.sort(table, dim=1, descending=True, stable=True).indices[:, : counts[0]]
        first = torch.arange(0, len(scores), lengths[0], device=scores.device)
        return (torch.sort(order, dim=1).values + first[:, None]).flatten()
    # Two spans of 2 and 3 rows, keep counts 1 and 2:
    #     scores                    1  5 | 2  9  5
    #     order by score            3  1  4  2  0     the sort is stable: row 1 before row 4
    #     stably by span            1  0 | 3  4  2
    #     places 0 | 2 3            1    | 3  4
    owner = torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths)).to(scores.device)
    order = torch.sort(scores, descending=True, stable=True).indices
    order = order[torch.sort(owner[order], stable=True).indices]
    best = [
        np.arange(begin, begin + k) for begin, k in zip(checks.starts(lengths), counts, strict=True)
    ]
    places = torch.from_numpy(np.concatenate(best)).to(scores.device)
    return torch.sort(order[places]).values


_op = dispatch.Op(
    "topk_stable",
    naive,
    checks.fake_choice,
    lambda scores, *_: checks.no_nan(
        scores, "scores contain NaN: no order is defined. Check the features they come from"
    ),
)
