"""Triton version of ``maxmin_select``.

For spans of up to ``MAX_GRAM_ROWS`` rows, one launch computes all cosines with tensor cores. A
second launch has one program per span, which takes all steps on the device and reads one row of
cosines per step. Longer spans do the same among the best ``CANDIDATES`` rows, in rounds as in the
plain version: every round reads all rows once, and the host waits once per round for the number of
choices.
"""

import itertools

import torch
import triton
import triton.language as tl
from tokencomp.kernels.maxmin_select.naive import EPSILON, TAKEN, UNDIRECTED
from tokencomp.kernels.segments import groups, stacked, starts, table
from tokencomp.kernels.tile import inverse_root, long_dot, padded
from torch import Tensor

MAX_GRAM_ROWS = 8192
# Number of candidates in a round of a longer span; a round may choose all of them.
CANDIDATES = 2048
# Number of cosines that are in memory at once (256 MiB in fp32).
GRAM_ELEMENTS = 1 << 26


@triton.jit
def unit_kernel(
    x, mean, span_of, unit, inverse, far, stride, dim,
    CENTRED: tl.constexpr, LIMIT: tl.constexpr, BLOCK_D: tl.constexpr,
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
def pitch(rows):
    """Distance between rows of the cosine matrix: a multiple of 16, so that loads can be wide."""
    return (rows + 15) // 16 * 16


@triton.jit
def gram_kernel(
    x, inverse, first_row, first_gram, gram, stride,
    DIM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Compute one BLOCK × BLOCK tile of the cosines of one span.

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
        tl.store(gram + begin + place, cosine, mask=mask)


@triton.jit
def greedy_kernel(
    gram, first_row, first_gram, first_pick, start_row, weights, picks,
    margins, nearest, guard_score, guard_place, steps_taken,
    LEAST: tl.constexpr, WEIGHTED: tl.constexpr, MARGIN: tl.constexpr, ROUND: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Take all steps of one span in one program.

    Every step depends on the one before, so a span cannot be shared between programs. All distances
    of the span stay in registers, and each step reads one row of cosines.

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
        cosine = tl.load(at, mask=row < pitch(rows), other=0.0)
        distance = tl.minimum(distance, tl.maximum(1.0 - cosine, LEAST))
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


def maxmin_select(
    x: Tensor,
    counts: list[int],
    weights: Tensor | None,
    lengths: list[int],
    centred: bool,
    margin: Tensor | None,
    start: Tensor | None,
) -> Tensor:
    """See :func:`tokencomp.kernels.maxmin_select.naive.maxmin_select`."""
    picks = torch.empty(sum(counts), dtype=torch.int64, device=x.device)
    if len(picks) == 0:
        return picks
    unit, inverse, far = unit_rows(x, lengths, centred)
    if start is None:
        start = first_choice(far if weights is None else weights, lengths)
    for group in grouped(lengths):
        run(group, unit, inverse, weights, lengths, counts, margin, start, picks)
    return picks


def unit_rows(x: Tensor, lengths: list[int], centred: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return the rows whose cosines are needed, their inverse norms and the distances to the mean.

    The rows are ``(n, D)``; inverse norms and distances to the span's mean are fp32 ``(n,)``.
    Centred rows are stored as unit vectors. For 16-bit inputs these are fp16, whose 11 significant
    bits are more exact than the 8 of bfloat16, and unit vectors need no larger range.
    """
    rows, dim = x.shape
    mean = torch.zeros(len(lengths), dim, dtype=torch.float32, device=x.device)
    order: dict[int, list[int]] = {}
    for span, length in enumerate(lengths):
        order.setdefault(length, []).append(span)
    for length, first in groups(lengths).items():
        if length:
            part = stacked(x, first, length).mean(1, dtype=torch.float32)
            mean[table(order[length], x.device, torch.int64)] = part
    inverse = torch.empty(rows, dtype=torch.float32, device=x.device)
    far = torch.empty_like(inverse)
    dtype = torch.float32 if x.dtype == torch.float32 else torch.float16
    unit = torch.empty(x.shape, dtype=dtype, device=x.device) if centred else x
    span_of = torch.repeat_interleave(table(lengths, x.device, torch.int64), output_size=rows)
    block_d = min(4096, triton.next_power_of_2(max(dim, 64)))
    unit_kernel[(rows,)](
        x, mean, span_of, unit, inverse, far, x.stride(0), dim,
        CENTRED=centred, LIMIT=UNDIRECTED, BLOCK_D=block_d,
        num_warps=max(1, min(8, block_d // 256)),
    )  # fmt: skip
    return unit, inverse, far


def first_choice(score: Tensor, lengths: list[int]) -> Tensor:
    """Return the row with the largest score of every span (0 for an empty span)."""
    best = [part.argmax() if len(part) else part.new_zeros((), dtype=torch.int64)
            for part in score.split(lengths)]  # fmt: skip
    return torch.stack(best)


def grouped(lengths: list[int]) -> list[list[int]]:
    """Group spans that run together.

    Consecutive spans share a group as long as their cosines fit into ``GRAM_ELEMENTS``. A span with
    more than ``MAX_GRAM_ROWS`` rows has a group of its own.
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
    x: Tensor,
    inverse: Tensor,
    weights: Tensor | None,
    lengths: list[int],
    counts: list[int],
    margin: Tensor | None,
    start: Tensor,
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
        span = slice(row[first], row[last])
        span_weights = None if weights is None else weights[span]
        run_rounds(x[span], inverse[span], span_weights, group_margin, start[first:], group_picks)
        group_picks += row[first]
        return
    rows, firsts = row[first : last + 1], table(pick[first : last + 1], x.device)
    greedy(x, inverse, rows, firsts, start[first:], weights, group_margin, picks)


def run_rounds(
    x: Tensor,
    inverse: Tensor,
    weights: Tensor | None,
    margin: Tensor | None,
    start: Tensor,
    picks: Tensor,
) -> None:
    """Choose in one long span and write the rows to `picks`.

    The algorithm is that of :class:`tokencomp.kernels.maxmin_select.naive._Rounds`, except that
    every round updates all rows. One launch does that without the host, whereas an update of
    selected rows would wait for the device several times per round.
    """
    nearest = torch.full_like(inverse, torch.inf)
    remaining = torch.ones_like(inverse) if weights is None else weights.clone()
    new, done = start[:1], 0
    while True:
        picks[done : done + len(new)] = new
        done += len(new)
        remaining[new] = TAKEN
        closest(x, inverse, new, nearest)
        if done == len(picks):
            return
        score = (nearest if margin is None else nearest + margin) * remaining
        ranked = score.sort(descending=True, stable=True).indices[: CANDIDATES + 1]
        candidates, guard = ranked[:-1].sort().values, ranked[-1:]
        limit = min(len(candidates), len(picks) - done)
        steps_taken = torch.full((1,), limit, dtype=torch.int32, device=x.device)
        local = torch.zeros(limit, dtype=torch.int64, device=x.device)
        greedy(
            x[candidates], inverse[candidates], [0, len(candidates)], table([0, limit], x.device),
            torch.searchsorted(candidates, ranked[:1]), remaining[candidates], margin, local,
            (nearest[candidates], score[guard], torch.searchsorted(candidates, guard), steps_taken),
        )  # fmt: skip
        new = candidates[local[: int(steps_taken)]]


def greedy(
    x: Tensor,
    inverse: Tensor,
    rows: list[int],
    first_pick: Tensor,
    start: Tensor,
    weights: Tensor | None,
    margin: Tensor | None,
    picks: Tensor,
    resume: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
) -> None:
    """Compute all cosines of spans that begin at `rows`, then take all steps.

    The last entry of `rows` is the end of the last span. `resume` holds the last four tensors of
    :func:`greedy_kernel` for a round, and is None otherwise.
    """
    lengths = [end - begin for begin, end in itertools.pairwise(rows)]
    squares = [length * triton.cdiv(length, 16) * 16 for length in lengths]
    gram = torch.empty(sum(squares), dtype=torch.float32, device=x.device)
    first_row = table(rows, x.device)
    first_gram = table(starts(squares), x.device, torch.int64)
    block, block_d, warps = gram_blocks(max(lengths), x.element_size())
    tiles = triton.cdiv(max(lengths), block)
    gram_kernel[(len(lengths), tiles, tiles)](
        x, inverse, first_row, first_gram, gram, x.stride(0),
        DIM=x.shape[1], BLOCK=block, BLOCK_D=block_d, num_warps=warps, num_stages=3,
    )  # fmt: skip
    wide = padded(max(lengths))
    greedy_kernel[(len(lengths),)](
        gram, first_row, first_gram, first_pick, start, weights, picks,
        margin, *(resume or (None,) * 4), LEAST=EPSILON, WEIGHTED=weights is not None,
        MARGIN=margin is not None, ROUND=resume is not None, BLOCK=wide,
        num_warps=greedy_warps(wide),
    )  # fmt: skip


def closest(x: Tensor, inverse: Tensor, new: Tensor, nearest: Tensor) -> None:
    """Lower `nearest` of every row to its distance from the closest of the rows `new`."""
    block, block_d, warps = closest_blocks(x.element_size())
    closest_kernel[(triton.cdiv(len(x), block),)](
        x, inverse, new, nearest, len(new), len(x), x.stride(0),
        LEAST=EPSILON, DIM=x.shape[1], BLOCK=block, BLOCK_D=block_d, num_warps=warps, num_stages=3,
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
