"""Greedy facility location: rows that together cover all rows best."""

from collections.abc import Sequence

import torch
from tokencomp.kernels import checks, dispatch
from tokencomp.kernels.errors import KernelError
from tokencomp.kernels.facility_select import naive
from torch import Tensor


def facility_select(
    unit: Tensor,
    k: int | Sequence[int],
    weights: Tensor | None = None,
    *,
    spans: int | Sequence[int] | Tensor | None = None,
    points: Tensor | None = None,
    point_spans: int | Sequence[int] | None = None,
    offset: Tensor | None = None,
) -> Tensor:
    r"""Choose rows one by one so that the covering of all points grows most.

    .. math:: next = \arg\max_j \; w_j \sum_i \max(0, M_{ij} - \max_{c \in chosen} M_{ic})

    within every span, where M is max(0, y_i · x_j), or with an offset exp(y_i · x_j - b_i). Ties go
    to the lower index, and gains that differ by less than a share of 4e-6 are ties. What improves
    the covering of a point by less than a share of 1e-5 is rounding and counts as 0, so that a copy
    of a chosen row gains nothing.

    Parameters
    ----------
    unit
        Rows x ``(n, D)`` in fp32 or fp64, spans one after the other; unit vectors for cosines.
    k
        Number of rows to choose in every span (int) or in each (sequence).
    weights
        Factor w ≥ 0 of every row, ``(n,)``. None means 1 for every row.
    spans
        Rows per span, as an int for equal spans or as one length per span. None means one span.
    points
        What is to be covered, y ``(m, D)`` in the dtype of `unit`, spans one after the other. None
        means the rows themselves.
    point_spans
        Points of every span, in the same forms as `spans`.
    offset
        b of every point, ``(m,)``. With b_i the log of Σ_j exp(y_i · x_j), M is a softmax over the
        rows. Only with `points`.

    Returns
    -------
    Tensor
        Chosen rows of `unit`, ascending, int64 ``(Σ k,)``.

    Raises
    ------
    KernelError
        If `k` exceeds a span, the spans do not cover their rows, shapes and dtypes do not fit, or
        weights are negative or not finite.

    Notes
    -----
    The plain version is lazy: a row's gain only falls while others are chosen, so that an earlier
    gain is an upper bound, and it is computed anew only where the bound reaches the best gain of
    the step. The set is that of the plain greedy choice, which computes all gains in every step. On
    clustered rows, a quarter of which are chosen, less than 8 % of the gains of 256 rows are
    computed, and less than 2 % of those of 2048.

    The bounds at the start take ``2·m·L·D`` FLOPs per span. A span whose matrix has at most 2²⁴
    entries keeps it (64 MiB); of a longer one a column is computed when it is asked for, and no
    more than 2²⁴ entries are in memory. The steps run on the host.

    The Triton version computes all gains in every step, and takes all steps in one launch. Spans
    above 8192 rows or 2²⁴ entries, or with k·m·L above 2³⁰, run in the plain version.
    """
    checks.operand("unit", unit, "(n, D)", checks.WIDE_FLOATS)
    lengths, counts = checks.spans_and_counts(k, spans, len(unit))
    (weights,) = checks.vectors(unit, weights=(weights, len(unit), unit.dtype))
    reach = lengths
    if points is not None:
        checks.operand("points", points, "(m, D)", [unit.dtype])
        checks.same_device(unit=unit, points=points)
        if points.shape[1] != unit.shape[1]:
            raise KernelError(f"points must be (m, {unit.shape[1]}); got {tuple(points.shape)}")
        reach = checks.lengths_of("point_spans", point_spans, len(points))
        if len(reach) != len(lengths):
            raise KernelError(f"{len(reach)} spans of points for {len(lengths)} spans of rows")
        (offset,) = checks.vectors(unit, offset=(offset, len(points), unit.dtype))
    elif offset is not None:
        raise KernelError("offset has one value per point; give `points` with it")
    return _op(unit, counts, weights, lengths, points, reach, offset)


def _check_values(
    unit: Tensor,
    counts: list[int],
    weights: Tensor | None,
    lengths: list[int],
    points: Tensor | None,
    reach: list[int],
    offset: Tensor | None,
) -> None:
    given = [t.sum() for t in (unit, points, weights, offset) if t is not None]
    checks.holds(torch.stack(given).isfinite().all(), "rows and factors must be finite")
    if weights is not None:
        checks.holds((weights >= 0).all(), "weights must be at least 0")


_op = dispatch.Op(naive.facility_select, checks.fake_choice, _check_values)
