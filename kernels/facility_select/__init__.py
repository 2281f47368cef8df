"""Greedy facility location: rows that together cover all rows best."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from tokencomp.kernels.maxmin_select.rounds import TIED
from torch import Tensor

from tokencomp.kernels import checks, dispatch
from tokencomp.kernels.errors import KernelError

# Entries of a matrix of coverings that are in memory at once.
DENSE_ENTRIES = 1 << 24
# Gains that are computed together. More would compute some that no choice needs.
TOGETHER = 8
# A covering that improves by less than this share does so by rounding.
ROUNDING = 1e-5

Numbers = np.ndarray[Any, np.dtype[Any]]


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
    # Negative weights would make a gain grow, and an earlier gain no upper bound.
    if weights is not None:
        checks.holds((weights >= 0).all(), "weights must be at least 0")


# Coverings M of three points (columns) by three rows, k = 2:
#                points         gain    gain after row 1, best = .5 1 .5
#     row 0    1   .5    0      1.5     .5     max(0, 1 - .5) + 0 + 0
#     row 1   .5    1   .5      2.0     chosen
#     row 2    0   .5    1      1.5     .5     ties with row 0, which is lower
# `greedy` knows the first gains, and updates the highest bounds first. Once a gain of .5 is
# exact, a row whose first gain was .3 needs no update.
class Coverage:
    """How well every row of one span covers every point, and the best covering so far.

    Attributes
    ----------
    best
        Covering of every point by the chosen rows, ``(m,)``.
    """

    def __init__(self, unit: Tensor, points: Tensor, offset: Tensor | None) -> None:
        self.unit, self.points, self.offset = unit, points, offset
        fits = len(unit) * len(points) <= DENSE_ENTRIES
        # (rows, points) as NumPy on the host, where all steps run.
        self.dense = self._covers(unit).cpu().numpy() if fits else None
        dtype = np.float64 if unit.dtype == torch.float64 else np.float32
        self.best: Numbers = np.zeros(len(points), dtype=dtype)

    def first_gains(self) -> Numbers:
        """Gain of every row while none is chosen, ``(L,)``."""
        if self.dense is not None:
            return self.dense.sum(1)
        # A span too long to keep its matrix: a block of rows at a time, and only sums remain.
        parts = self.unit.split(max(1, DENSE_ENTRIES // max(1, len(self.points))))
        return torch.cat([self._covers(part).sum(1) for part in parts]).cpu().numpy()

    def gains(self, rows: Numbers) -> Numbers:
        """By how much each of `rows` would improve the covering of all points together."""
        covers = self.columns(rows)
        # (rows, points). A copy of a chosen row covers each point as well, but for rounding.
        better = covers > self.best * (1 + ROUNDING)
        return np.where(better, covers - self.best, 0).sum(1)

    def choose(self, row: int) -> None:
        """Add a row to the chosen ones."""
        # A set covers a point as well as its best row does.
        np.maximum(self.best, self.columns(np.array([row]))[0], out=self.best)

    def columns(self, rows: Numbers) -> Numbers:
        """Coverings of all points by each of `rows`, ``(rows, m)``."""
        if self.dense is not None:
            return self.dense[rows]
        chosen = self.unit[torch.from_numpy(rows).to(self.unit.device)]
        return self._covers(chosen).cpu().numpy()

    def _covers(self, rows: Tensor) -> Tensor:
        products = rows @ self.points.T
        # Cosines cover from 0 on; a softmax has its denominator in the offset.
        return products.clamp_(min=0) if self.offset is None else (products - self.offset).exp_()


def naive(
    unit: Tensor,
    counts: list[int],
    weights: Tensor | None,
    lengths: list[int],
    points: Tensor | None,
    reach: list[int],
    offset: Tensor | None,
) -> Tensor:
    """Return the chosen rows of all spans, ascending; the steps run on the host."""
    covered = (unit if points is None else points).split(reach)
    offsets = [None] * len(reach) if offset is None else offset.split(reach)
    chosen, start = [np.empty(0, dtype=np.int64)], 0
    for rows, count, own, shift in zip(unit.split(lengths), counts, covered, offsets, strict=True):
        if count:
            factor = None if weights is None else weights[start : start + len(rows)].cpu().numpy()
            chosen.append(start + greedy(Coverage(rows, own, shift), len(rows), count, factor))
        start += len(rows)
    return torch.from_numpy(np.concatenate(chosen)).to(unit.device)


def greedy(coverage: Coverage, length: int, count: int, weight: Numbers | None) -> Numbers:
    """Choose `count` of `length` rows; the result is ascending.

    `scores` are upper bounds, exact where `seen` is the present step. A chosen row has the score
    -1.
    """
    scores = coverage.first_gains()
    if weight is not None:
        scores = scores * weight
    seen, taken = np.zeros(length, dtype=np.int64), np.zeros(length, dtype=np.bool_)
    # Each turn of the inner loop updates the most promising bounds, until the best gain is exact.
    for step in range(count):
        while True:
            fresh = (seen == step) | (scores <= 0)  # what gains nothing never will
            # Only bounds that reach the best exact gain, or tie with it, can change the choice.
            line = scores[fresh].max(initial=-1.0)
            open_rows = np.flatnonzero(~fresh & (scores >= line * TIED))
            if not len(open_rows):
                break
            # The highest bounds first: their gains raise the line, and lower ones may stay stale.
            if len(open_rows) > TOGETHER:
                most = np.argpartition(-scores[open_rows], TOGETHER - 1)[:TOGETHER]
                open_rows = open_rows[most]
            gains = coverage.gains(open_rows)
            scores[open_rows] = gains if weight is None else gains * weight[open_rows]
            seen[open_rows] = step
        best = scores.max()
        row = int((scores >= min(best, best * TIED)).argmax())  # the first of those that tie
        scores[row], taken[row] = -1.0, True
        coverage.choose(row)
    return np.flatnonzero(taken)


_op = dispatch.Op("facility_select", naive, checks.fake_choice, _check_values)
