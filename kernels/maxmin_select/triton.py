"""Triton version of ``maxmin_select``.

For spans of up to ``MAX_GRAM_ROWS`` rows, one launch computes all distances, cosines with tensor
cores. A second launch has one program per span, which takes all steps on the device and reads one
row of distances per step. Longer spans do the same among the best ``CANDIDATES`` rows, in rounds as
in the plain version: every round reads all rows once, and the host waits once per round for the
number of choices.
"""

import itertools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from tokencomp.kernels.maxmin_select import naive
from tokencomp.kernels.maxmin_select.naive import EPSILON, TAKEN, UNDIRECTED
from tokencomp.kernels.segments import starts, table
from tokencomp.kernels.tile import inverse_root, long_dot, padded
from torch import Tensor

MAX_GRAM_ROWS = 8192
# Number of candidates in a round of a longer span; a round may choose all of them.
CANDIDATES = 2048
# Number of distances that are in memory at once (256 MiB in fp32).
GRAM_ELEMENTS = 1 << 26
# Rows and features of a tile of a mean.
MEAN_BLOCK = (32, 64)
# Rows and columns of a tile of root mean squares.
DIFFERENCE_BLOCK = 32


@triton.jit
def unit_kernel(
    x, mean, span_of, unit, inverse, far, stride, dim,
    CENTRED: tl.constexpr, LIMIT: tl.constexpr, BLOCK_D: tl.constexpr, RMS: tl.constexpr = False,
):  # fmt: skip
    """Compute 1/norm and the distance to the span's mean of one row, and its centred unit vector.

    The grid is (rows,). Without CENTRED no unit vector is stored: the products read `x` itself and
    apply the inverse norms afterwards, which saves a copy of the features.
    """
    row = tl.program_id(0).to(tl.int64)
    mean += tl.load(span_of + row).to(tl.int64) * dim
    x += row * stride
    square = 0.0
    mean_square = 0.0
    along = 0.0
    around = 0.0
    for chunk in range(0, dim, BLOCK_D):
        d = chunk + tl.arange(0, BLOCK_D)
        value = tl.load(x + d, mask=d < dim, other=0.0).to(tl.float32)
        centre = tl.load(mean + d, mask=d < dim, other=0.0)
        square += tl.sum(value * value, axis=0)
        mean_square += tl.sum(centre * centre, axis=0)
        along += tl.sum(value * centre, axis=0)
        around += tl.sum((value - centre) * (value - centre), axis=0)
    if RMS:
        tl.store(far + row, around)
    else:
        tl.store(far + row, 1.0 - along * inverse_root(square) * inverse_root(mean_square))
    if CENTRED:
        scale = tl.where(around > LIMIT * square, inverse_root(around), 0.0)
        for chunk in range(0, dim, BLOCK_D):
            d = chunk + tl.arange(0, BLOCK_D)
            value = tl.load(x + d, mask=d < dim, other=0.0).to(tl.float32)
            centre = tl.load(mean + d, mask=d < dim, other=0.0)
            value = (value - centre) * scale
            tl.store(unit + row * dim + d, value.to(unit.dtype.element_ty), mask=d < dim)
        tl.store(inverse + row, 1.0)
    else:
        tl.store(inverse + row, inverse_root(square))


@triton.jit
def mean_kernel(
    x, scale, first_row, mean, stride, dim,
    SCALED: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Compute the mean of the rows of every span, each times its `scale` where SCALED.

    The grid is (spans, blocks of features). The order of additions depends on the span alone.
    """
    span = tl.program_id(0)
    start = tl.load(first_row + span)
    stop = tl.load(first_row + span + 1)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    for begin in range(start, stop, BLOCK_R):
        row = begin + tl.arange(0, BLOCK_R)
        mask = (row < stop)[:, None] & (d < dim)[None, :]
        at = x + row.to(tl.int64)[:, None] * stride + d[None, :]
        value = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        if SCALED:
            value *= tl.load(scale + row, mask=row < stop, other=0.0)[:, None]
        total += value
    count = tl.maximum(stop - start, 1)
    tl.store(mean + span.to(tl.int64) * dim + d, tl.sum(total, axis=0) / count, mask=d < dim)


@triton.jit
def first_kernel(score, first_row, first, BLOCK: tl.constexpr):
    """Find the row with the largest score of every span, the lowest of equals (0 without rows).

    The grid is (spans,).
    """
    span = tl.program_id(0)
    start = tl.load(first_row + span)
    rows = tl.load(first_row + span + 1) - start
    best = -float("inf")
    place = tl.zeros([], tl.int32)
    for begin in range(0, rows, BLOCK):
        row = begin + tl.arange(0, BLOCK)
        value = tl.load(score + start + row, mask=row < rows, other=-float("inf"))
        top = tl.max(value, axis=0)
        at = begin + tl.argmax(value, axis=0, tie_break_left=True)
        place = tl.where(top > best, at, place)
        best = tl.maximum(best, top)
    tl.store(first + span, place.to(tl.int64))


@triton.jit
def pitch(rows):
    """Distance in memory between rows of distances: a multiple of 16, so that loads can be wide."""
    return (rows + 15) // 16 * 16


@triton.jit
def gram_kernel(
    x, inverse, first_row, first_gram, gram, stride,
    LEAST: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Compute one BLOCK × BLOCK tile of the distances 1 - cos of one span.

    The grid is (spans, tiles, tiles) for the longest span. Programs outside of a shorter span end
    at once.
    """
    span = tl.program_id(0)
    start = tl.load(first_row + span)
    rows = tl.load(first_row + span + 1) - start
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    j = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    if (tl.program_id(1) * BLOCK < rows) & (tl.program_id(2) * BLOCK < rows):
        x += start.to(tl.int64) * stride
        left_rows = x + i.to(tl.int64) * stride
        right_rows = x + j.to(tl.int64) * stride
        dots = tl.zeros([BLOCK, BLOCK], tl.float32)
        dots = long_dot(left_rows, i < rows, right_rows, j < rows, dots, DIM, BLOCK_D)
        left = tl.load(inverse + start + i, mask=i < rows, other=0.0)
        right = tl.load(inverse + start + j, mask=j < rows, other=0.0)
        place = i.to(tl.int64)[:, None] * pitch(rows) + j[None, :]
        mask = (i < rows)[:, None] & (j < rows)[None, :]
        cosine = dots * left[:, None] * right[None, :]
        begin = tl.load(first_gram + span) // 16 * 16
        tl.store(gram + begin + place, tl.maximum(1.0 - cosine, LEAST), mask=mask)


@triton.jit
def mean_square(columns, left, left_inside, right, right_inside, rows, dim, zeros):
    """Mean squares of the differences of rows `left` and rows `right`; `zeros` has their shape.

    `columns` is ``(D, rows)``: the rows of a tile lie side by side, one feature after the other.
    """
    total = zeros
    for _ in range(dim):
        a = tl.load(columns + left, mask=left_inside, other=0.0)
        b = tl.load(columns + right, mask=right_inside, other=0.0)
        difference = a[:, None] - b[None, :]
        total += difference * difference
        columns += rows
    return total / dim


@triton.jit
def difference_kernel(
    columns, first_row, first_gram, gram, total_rows, dim, LEAST: tl.constexpr, BLOCK: tl.constexpr
):
    """Compute one BLOCK × BLOCK tile of the root mean squares of differences of one span.

    The grid is that of :func:`gram_kernel`; `columns` is fp32 ``(D, rows of all spans)``.
    """
    span = tl.program_id(0)
    start = tl.load(first_row + span)
    rows = tl.load(first_row + span + 1) - start
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    j = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    if (tl.program_id(1) * BLOCK < rows) & (tl.program_id(2) * BLOCK < rows):
        zeros = tl.zeros([BLOCK, BLOCK], tl.float32)
        square = mean_square(
            columns, start + i, i < rows, start + j, j < rows, total_rows, dim, zeros
        )
        place = i.to(tl.int64)[:, None] * pitch(rows) + j[None, :]
        mask = (i < rows)[:, None] & (j < rows)[None, :]
        begin = tl.load(first_gram + span) // 16 * 16
        tl.store(gram + begin + place, tl.maximum(tl.sqrt(square), LEAST), mask=mask)


@triton.jit
def isolated_kernel(gram, first_row, first_gram, nearest, BLOCK: tl.constexpr):
    """Find the distance of one row from the nearest other row of its span.

    The grid is (rows of the longest span, spans).
    """
    span = tl.program_id(1)
    start = tl.load(first_row + span)
    rows = tl.load(first_row + span + 1) - start
    i = tl.program_id(0)
    if i < rows:
        gram += tl.load(first_gram + span) // 16 * 16 + i.to(tl.int64) * pitch(rows)
        closest = tl.full([BLOCK], float("inf"), tl.float32)
        for begin in range(0, rows, BLOCK):
            j = begin + tl.arange(0, BLOCK)
            other = (j < rows) & (j != i)
            closest = tl.minimum(closest, tl.load(gram + j, mask=other, other=float("inf")))
        tl.store(nearest + start + i, tl.min(closest, axis=0))


@triton.jit
def greedy_kernel(
    gram, first_row, first_gram, first_pick, start_row, weights, picks,
    margins, nearest, guard_score, guard_place, steps_taken,
    WEIGHTED: tl.constexpr, MARGIN: tl.constexpr, ROUND: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Take all steps of one span in one program.

    Every step depends on the one before, so a span cannot be shared between programs. The distances
    from the choices stay in registers, and each step reads one row of `gram`, the distances of all
    pairs.

    With ROUND, the rows are the candidates of a round and `nearest` holds their distances from
    earlier choices. The loop ends when the guard, whose place in row order is before candidate
    `guard_place`, is better than every candidate. `steps_taken` receives the number of steps.
    """
    span = tl.program_id(0)
    start = tl.load(first_row + span)
    rows = tl.load(first_row + span + 1) - start
    begin = tl.load(first_pick + span)
    count = tl.load(first_pick + span + 1) - begin
    gram += tl.load(first_gram + span) // 16 * 16
    row = tl.arange(0, BLOCK)
    inside = row < rows
    distance = tl.full([BLOCK], float("inf"), tl.float32)
    if ROUND:
        distance = tl.load(nearest + row, mask=inside, other=0.0)
        bar = tl.load(guard_score)
        place = tl.load(guard_place)
    # A negative weight marks rows that are chosen already or lie outside of the span.
    weight = tl.where(inside, 1.0, -1.0)
    if WEIGHTED:
        weight = tl.load(weights + start + row, mask=inside, other=-1.0)
    margin = 0.0
    if MARGIN:
        margin = tl.load(margins + span)
    last = tl.load(start_row + span).to(tl.int32)
    step = 0
    while step < count:
        tl.store(picks + begin + step, (start + last).to(tl.int64))
        weight = tl.where(row == last, -1.0, weight)
        # The mask reaches up to the pitch instead of the last row: a mask in units of 16 lets the
        # loads be wide. Entries in between are never chosen, because their weight is negative.
        at = gram + last.to(tl.int64) * pitch(rows) + row
        distance = tl.minimum(distance, tl.load(at, mask=row < pitch(rows), other=0.0))
        score = tl.where(weight < 0.0, -1.0, (distance + margin) * weight)
        last = tl.argmax(score, axis=0, tie_break_left=True)
        step += 1
        if ROUND:
            best = tl.max(score, axis=0)
            # A tie goes to the lower row, which is the guard if its place is not after `last`.
            over = (best < bar) | ((best == bar) & (last >= place))
            count = tl.where(over, step, count)
    if ROUND:
        tl.store(steps_taken, step)


@triton.jit(do_not_specialize=["count"])
def closest_kernel(
    x, inverse, picks, nearest, count, rows, stride,
    LEAST: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Lower `nearest` of BLOCK rows to their distance from the closest of the rows `picks`.

    The grid is (blocks of rows,). `count` picks are compared BLOCK at a time. It differs from call
    to call, so it is not specialised, as each new value would compile the kernel again.
    """
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    left = tl.load(inverse + i, mask=i < rows, other=0.0)
    left_rows = x + i.to(tl.int64) * stride
    closest = tl.full([BLOCK], -float("inf"), tl.float32)
    for first in range(0, count, BLOCK):
        p = first + tl.arange(0, BLOCK)
        j = tl.load(picks + p, mask=p < count, other=0)
        right = tl.load(inverse + j, mask=p < count, other=0.0)
        dots = tl.zeros([BLOCK, BLOCK], tl.float32)
        dots = long_dot(left_rows, i < rows, x + j * stride, p < count, dots, DIM, BLOCK_D)
        cosine = dots * left[:, None] * right[None, :]
        cosine = tl.where((p < count)[None, :], cosine, -float("inf"))
        closest = tl.maximum(closest, tl.max(cosine, axis=1))
    before = tl.load(nearest + i, mask=i < rows, other=0.0)
    distance = tl.maximum(1.0 - closest, LEAST)
    tl.store(nearest + i, tl.minimum(before, distance), mask=i < rows)


@triton.jit(do_not_specialize=["count"])
def closest_difference_kernel(
    columns, picks, nearest, count, rows, dim, LEAST: tl.constexpr, BLOCK: tl.constexpr
):
    """:func:`closest_kernel` for root mean squares of differences; `columns` is fp32 ``(D, rows)``.

    The grid is (blocks of rows,).
    """
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    closest = tl.full([BLOCK], float("inf"), tl.float32)
    for first in range(0, count, BLOCK):
        p = first + tl.arange(0, BLOCK)
        j = tl.load(picks + p, mask=p < count, other=0)
        zeros = tl.zeros([BLOCK, BLOCK], tl.float32)
        square = mean_square(columns, i, i < rows, j, p < count, rows, dim, zeros)
        square = tl.where((p < count)[None, :], square, float("inf"))
        closest = tl.minimum(closest, tl.min(square, axis=1))
    before = tl.load(nearest + i, mask=i < rows, other=0.0)
    distance = tl.maximum(tl.sqrt(closest), LEAST)
    tl.store(nearest + i, tl.minimum(before, distance), mask=i < rows)


def maxmin_select(
    x: Tensor,
    counts: list[int],
    weights: Tensor | None,
    lengths: list[int],
    centred: bool,
    margin: Tensor | None,
    start: Tensor | None,
    metric: str = "cosine",
    isolated: bool = False,
) -> Tensor:
    """See :func:`tokencomp.kernels.maxmin_select.naive.maxmin_select`."""
    picks = torch.empty(sum(counts), dtype=torch.int64, device=x.device)
    if len(picks) == 0:
        return picks
    rms = metric == "rms"
    unit, inverse, far = unit_rows(x, lengths, centred and not rms, rms)
    if start is None and not isolated:
        start = first_choice(far if weights is None else weights, lengths)
    rows: Rows = Differences(x.T.float().contiguous()) if rms else Cosines(unit, inverse)
    for group in grouped(lengths):
        run(group, rows, weights, lengths, counts, margin, start, picks)
    return picks


class Cosines(NamedTuple):
    """Rows that are compared by the cosine: `x` ``(n, D)``, and the inverse of their norms."""

    x: Tensor
    inverse: Tensor

    def pairs(self, first_row: Tensor, first_gram: Tensor, gram: Tensor, longest: int) -> None:
        """Write the distances of all pairs of rows of the spans at `first_row` to `gram`."""
        block, block_d, warps = gram_blocks(longest, self.x.element_size())
        tiles = triton.cdiv(longest, block)
        gram_kernel[(len(first_row) - 1, tiles, tiles)](
            self.x, self.inverse, first_row, first_gram, gram, self.x.stride(0), LEAST=EPSILON,
            DIM=self.x.shape[1], BLOCK=block, BLOCK_D=block_d, num_warps=warps, num_stages=3,
        )  # fmt: skip

    def closest(self, new: Tensor, nearest: Tensor) -> None:
        """Lower `nearest` of every row to its distance from the closest of the rows `new`."""
        x = self.x
        block, block_d, warps = closest_blocks(x.element_size())
        closest_kernel[(triton.cdiv(len(x), block),)](
            x, self.inverse, new, nearest, len(new), len(x), x.stride(0), LEAST=EPSILON,
            DIM=x.shape[1], BLOCK=block, BLOCK_D=block_d, num_warps=warps, num_stages=3,
        )  # fmt: skip

    def isolated(self) -> Tensor:
        """The row whose nearest other row is farthest, ``(1,)``, in blocks of all pairs."""
        unit = (self.x.float() * self.inverse[:, None])[None]
        return naive.isolated_row(unit, naive.Cosine, None)

    def part(self, rows: slice | Tensor) -> "Cosines":
        """Some of the rows."""
        return self._replace(x=self.x[rows], inverse=self.inverse[rows])


class Differences(NamedTuple):
    """Rows that are compared by the root mean square of their differences.

    `columns` is fp32 ``(D, n)``, so that programs read the rows of a tile side by side.
    """

    columns: Tensor

    def pairs(self, first_row: Tensor, first_gram: Tensor, gram: Tensor, longest: int) -> None:
        """See :meth:`Cosines.pairs`."""
        dim, total = self.columns.shape
        tiles = triton.cdiv(longest, DIFFERENCE_BLOCK)
        difference_kernel[(len(first_row) - 1, tiles, tiles)](
            self.columns, first_row, first_gram, gram, total, dim,
            LEAST=EPSILON, BLOCK=DIFFERENCE_BLOCK, num_warps=4,
        )  # fmt: skip

    def closest(self, new: Tensor, nearest: Tensor) -> None:
        """See :meth:`Cosines.closest`."""
        dim, total = self.columns.shape
        closest_difference_kernel[(triton.cdiv(total, DIFFERENCE_BLOCK),)](
            self.columns, new, nearest, len(new), total, dim,
            LEAST=EPSILON, BLOCK=DIFFERENCE_BLOCK, num_warps=4,
        )  # fmt: skip

    def isolated(self) -> Tensor:
        """See :meth:`Cosines.isolated`."""
        return naive.isolated_row(self.columns.T[None], naive.RootMeanSquare, None)

    def part(self, rows: slice | Tensor) -> "Differences":
        """Some of the rows."""
        return self._replace(columns=self.columns[:, rows].contiguous())


Rows = Cosines | Differences


def unit_rows(
    x: Tensor, lengths: list[int], centred: bool, rms: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the rows whose cosines are needed, their inverse norms and the distances to the mean.

    The rows are ``(n, D)``; inverse norms and distances to the span's mean are fp32 ``(n,)``. With
    `rms` the distances are sums of squared differences, whose order is the same.
    Centred rows are stored as unit vectors. For 16-bit inputs these are fp16, whose 11 significant
    bits are more exact than the 8 of bfloat16, and unit vectors need no larger range.
    """
    rows, dim = x.shape
    mean = means(x, None, lengths)
    inverse = torch.empty(rows, dtype=torch.float32, device=x.device)
    far = torch.empty_like(inverse)
    dtype = torch.float32 if x.dtype == torch.float32 else torch.float16
    unit = torch.empty(x.shape, dtype=dtype, device=x.device) if centred else x
    span_of = torch.repeat_interleave(table(lengths, x.device, torch.int64), output_size=rows)
    block_d = min(4096, triton.next_power_of_2(max(dim, 64)))
    unit_kernel[(rows,)](
        x, mean, span_of, unit, inverse, far, x.stride(0), dim,
        CENTRED=centred, LIMIT=UNDIRECTED, BLOCK_D=block_d, RMS=rms,
        num_warps=max(1, min(8, block_d // 256)),
    )  # fmt: skip
    return unit, inverse, far


def means(x: Tensor, scale: Tensor | None, lengths: list[int]) -> Tensor:
    """Return the mean of the rows of every span, each times its `scale`, fp32 ``(spans, D)``."""
    mean = torch.empty(len(lengths), x.shape[1], dtype=torch.float32, device=x.device)
    first_row = table([0, *itertools.accumulate(lengths)], x.device)
    mean_kernel[(len(lengths), triton.cdiv(x.shape[1], MEAN_BLOCK[1]))](
        x, x if scale is None else scale, first_row, mean, x.stride(0), x.shape[1],
        SCALED=scale is not None, BLOCK_R=MEAN_BLOCK[0], BLOCK_D=MEAN_BLOCK[1], num_warps=4,
    )  # fmt: skip
    return mean


def mean_distance(x: Tensor, lengths: list[int], centred: bool) -> Tensor:
    """See :func:`tokencomp.kernels.mean_distance`."""
    unit, inverse, _ = unit_rows(x, lengths, centred)
    return (1 - means(unit, inverse, lengths).square().sum(1)).clamp_(min=0)


def first_choice(score: Tensor, lengths: list[int]) -> Tensor:
    """Return the row with the largest score of every span (0 for an empty span)."""
    first = torch.zeros(len(lengths), dtype=torch.int64, device=score.device)
    first_row = table([0, *itertools.accumulate(lengths)], score.device)
    first_kernel[(len(lengths),)](score, first_row, first, BLOCK=1024, num_warps=4)
    return first


def grouped(lengths: list[int]) -> list[list[int]]:
    """Group spans that run together.

    Consecutive spans share a group as long as their distances fit into ``GRAM_ELEMENTS``. A span
    with more than ``MAX_GRAM_ROWS`` rows has a group of its own.
    """
    result: list[list[int]] = []
    room = 0
    for span, length in enumerate(lengths):
        if length > MAX_GRAM_ROWS or length * length > room or not result:
            result.append([])
            room = GRAM_ELEMENTS if length <= MAX_GRAM_ROWS else 0
        result[-1].append(span)
        room -= length * length
    return result


def run(
    group: list[int],
    rows: Rows,
    weights: Tensor | None,
    lengths: list[int],
    counts: list[int],
    margin: Tensor | None,
    start: Tensor | None,
    picks: Tensor,
) -> None:
    """Choose the rows of the spans in one group and write them to `picks` ``(Σ counts,)``."""
    longest = max(lengths[span] for span in group)
    first, last = group[0], group[-1] + 1
    row, pick = starts([*lengths, 0]), starts([*counts, 0])
    group_margin = None if margin is None else margin[first:last]
    group_picks = picks[pick[first] : pick[last]]
    if not len(group_picks):
        return
    if longest > MAX_GRAM_ROWS:
        span, length = slice(row[first], row[last]), lengths[first]
        span_weights = None if weights is None else weights[span]
        part = rows.part(span)
        begin = part.isolated() if start is None else start[first:]
        run_rounds(part, span_weights, length, group_margin, begin, group_picks)
        group_picks += row[first]
        return
    firsts = table(pick[first : last + 1], picks.device)
    begin = None if start is None else start[first:]
    greedy(rows, row[first : last + 1], firsts, begin, weights, group_margin, picks)


def run_rounds(
    rows: Rows,
    weights: Tensor | None,
    length: int,
    margin: Tensor | None,
    start: Tensor,
    picks: Tensor,
) -> None:
    """Choose in one long span of `length` rows and write them to `picks`.

    The algorithm is that of :class:`tokencomp.kernels.maxmin_select.naive._Rounds`, except that
    every round updates all rows. One launch does that without the host, whereas an update of
    selected rows would wait for the device several times per round.
    """
    device = picks.device
    nearest = torch.full((length,), torch.inf, device=device)
    remaining = torch.ones_like(nearest) if weights is None else weights.clone()
    new, done = start[:1], 0
    while True:
        picks[done : done + len(new)] = new
        done += len(new)
        remaining[new] = TAKEN
        rows.closest(new, nearest)
        if done == len(picks):
            return
        score = (nearest if margin is None else nearest + margin) * remaining
        ranked = score.sort(descending=True, stable=True).indices[: CANDIDATES + 1]
        candidates, guard = ranked[:-1].sort().values, ranked[-1:]
        limit = min(len(candidates), len(picks) - done)
        steps_taken = torch.full((1,), limit, dtype=torch.int32, device=device)
        local = torch.zeros(limit, dtype=torch.int64, device=device)
        greedy(
            rows.part(candidates), [0, len(candidates)], table([0, limit], device),
            torch.searchsorted(candidates, ranked[:1]), remaining[candidates], margin, local,
            (nearest[candidates], score[guard], torch.searchsorted(candidates, guard), steps_taken),
        )  # fmt: skip
        new = candidates[local[: int(steps_taken)]]


def greedy(
    rows: Rows,
    bounds: list[int],
    first_pick: Tensor,
    start: Tensor | None,
    weights: Tensor | None,
    margin: Tensor | None,
    picks: Tensor,
    resume: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
) -> None:
    """Compute all distances of spans that begin at rows `bounds`, then take all steps.

    The last of the bounds is the end of the last span. `start` is None for the rows whose nearest
    other row is farthest. `resume` holds the last four tensors of
    :func:`greedy_kernel` for a round, and is None otherwise.
    """
    lengths, device = [end - begin for begin, end in itertools.pairwise(bounds)], picks.device
    squares = [length * triton.cdiv(length, 16) * 16 for length in lengths]
    gram = torch.empty(sum(squares), dtype=torch.float32, device=device)
    first_row, first_gram = table(bounds, device), table(starts(squares), device, torch.int64)
    rows.pairs(first_row, first_gram, gram, max(lengths))
    if start is None:
        nearest = torch.empty(bounds[-1], dtype=torch.float32, device=device)
        isolated_kernel[(max(lengths), len(lengths))](
            gram, first_row, first_gram, nearest, BLOCK=1024, num_warps=4
        )
        start = first_choice(nearest[bounds[0] :], lengths)
    wide = padded(max(lengths))
    greedy_kernel[(len(lengths),)](
        gram, first_row, first_gram, first_pick, start, weights, picks,
        margin, *(resume or (None,) * 4), WEIGHTED=weights is not None,
        MARGIN=margin is not None, ROUND=resume is not None, BLOCK=wide,
        num_warps=greedy_warps(wide),
    )  # fmt: skip


def gram_blocks(rows: int, itemsize: int) -> tuple[int, int, int]:
    """Return (rows, features, warps) of a tile of cosines.

    Short spans take smaller tiles, so that there are enough of them to fill the GPU.
    """
    if itemsize == 4:
        return 32, 32, 4
    return (64, 64, 4) if rows <= 1024 else (128, 32, 8)


def closest_blocks(itemsize: int) -> tuple[int, int, int]:
    """Return (rows and choices, features, warps) of a tile.

    A round has few choices but all rows, so the tiles are small.
    """
    return (32, 16, 4) if itemsize == 4 else (64, 64, 4)


def greedy_warps(block: int) -> int:
    """Return the warps of a program that owns a span, so that a thread has at most 16 values."""
    return max(1, min(16, block // 256))
