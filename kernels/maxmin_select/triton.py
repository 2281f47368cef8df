"""Triton version of ``maxmin_select``.

Spans of up to ``MAX_GRAM_ROWS`` rows: one launch computes all cosines with tensor cores, then one
program per span runs all its steps on the device, each reading one row of cosines. Longer spans:
one launch per step, spread over the GPU; each program finds the last choice from the block maxima
of the launch before, so that the host never waits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..segments import groups, stacked, starts, table
from ..tile import dot, inverse_root, padded
from .naive import UNDIRECTED

MAX_GRAM_ROWS = 8192
# Cosines stored at once, 256 MiB in fp32.
GRAM_ELEMENTS = 1 << 26


@triton.jit
def unit_kernel(
    x, mean, span_of, unit, inverse, far, stride, dim,
    CENTRED: tl.constexpr, LIMIT: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Per row: 1/norm, distance to the span's mean, and the centred unit vector if wanted."""
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
    """Distance between rows of cosines: a multiple of 16, so that loads can be wide."""
    return (rows + 15) // 16 * 16


@triton.jit
def gram_kernel(
    x, inverse, first_row, first_gram, gram, stride, dim,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One BLOCK × BLOCK tile of the cosines of one span."""
    span = tl.program_id(0)
    start = tl.load(first_row + span)
    rows = tl.load(first_row + span + 1) - start
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    j = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    if (tl.program_id(1) * BLOCK < rows) & (tl.program_id(2) * BLOCK < rows):
        x += start.to(tl.int64) * stride
        dots = tl.zeros([BLOCK, BLOCK], tl.float32)
        for chunk in range(0, dim, BLOCK_D):
            d = chunk + tl.arange(0, BLOCK_D)
            a = tl.load(
                x + i.to(tl.int64)[:, None] * stride + d[None, :],
                mask=(i < rows)[:, None] & (d < dim)[None, :],
                other=0.0,
            )
            b = tl.load(
                x + j.to(tl.int64)[:, None] * stride + d[None, :],
                mask=(j < rows)[:, None] & (d < dim)[None, :],
                other=0.0,
            )
            dots = dot(a, tl.trans(b), dots)
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
    WEIGHTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """All steps of one span."""
    span = tl.program_id(0)
    start = tl.load(first_row + span)
    rows = tl.load(first_row + span + 1) - start
    begin = tl.load(first_pick + span)
    count = tl.load(first_pick + span + 1) - begin
    gram += tl.load(first_gram + span) // 16 * 16
    row = tl.arange(0, BLOCK)
    inside = row < rows
    nearest = tl.full([BLOCK], float("inf"), tl.float32)
    # A negative weight marks rows that cannot be chosen (any more).
    weight = tl.where(inside, 1.0, -1.0)
    if WEIGHTED:
        weight = tl.load(weights + start + row, mask=inside, other=-1.0)
    last = tl.load(start_row + span).to(tl.int32)
    for step in range(count):
        tl.store(picks + begin + step, (start + last).to(tl.int64))
        weight = tl.where(row == last, -1.0, weight)
        # Up to the pitch, not the last row: a mask in units of 16 lets the loads be wide. What lies
        # between is never chosen, its weight is negative.
        at = gram + last.to(tl.int64) * pitch(rows) + row
        cosine = tl.load(at, mask=row < pitch(rows), other=0.0)
        nearest = tl.minimum(nearest, tl.maximum(1.0 - cosine, 0.0))
        score = tl.where(weight < 0.0, -1.0, nearest * weight)
        last = tl.argmax(score, axis=0, tie_break_left=True)


@triton.jit
def step_kernel(
    x, inverse, weights, nearest, best_score, best_row, last_score, last_row, picks, start_row,
    step, blocks, rows, stride, dim,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """One step of one long span for BLOCK rows; `last_*` are the block maxima of the last step."""
    block = tl.program_id(0)
    last = tl.load(start_row).to(tl.int32)
    if step > 0:
        b = tl.arange(0, BLOCK_B)
        score = tl.load(last_score + b, mask=b < blocks, other=-2.0)
        winner = tl.argmax(score, axis=0, tie_break_left=True)
        last = tl.load(last_row + winner)
    if block == 0:
        tl.store(picks + step, last.to(tl.int64))
    row = block * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    dots = tl.zeros([BLOCK], tl.float32)
    for chunk in range(0, dim, BLOCK_D):
        d = chunk + tl.arange(0, BLOCK_D)
        chosen = tl.load(x + last.to(tl.int64) * stride + d, mask=d < dim, other=0.0)
        value = tl.load(
            x + row.to(tl.int64)[:, None] * stride + d[None, :],
            mask=inside[:, None] & (d < dim)[None, :],
            other=0.0,
        )
        dots += tl.sum(value.to(tl.float32) * chosen.to(tl.float32)[None, :], axis=1)
    scale = tl.load(inverse + row, mask=inside, other=0.0) * tl.load(inverse + last)
    distance = tl.load(nearest + row, mask=inside, other=0.0)
    distance = tl.minimum(distance, tl.maximum(1.0 - dots * scale, 0.0))
    weight = tl.load(weights + row, mask=inside, other=-1.0)
    weight = tl.where(row == last, -1.0, weight)
    score = tl.where(weight < 0.0, -1.0, distance * weight)
    tl.store(nearest + row, distance, mask=inside)
    tl.store(weights + row, weight, mask=inside)
    winner = tl.argmax(score, axis=0, tie_break_left=True)
    tl.store(best_score + block, tl.max(score, axis=0))
    tl.store(best_row + block, block * BLOCK + winner)


def maxmin_select(
    x: Tensor,
    counts: list[int],
    weights: Tensor | None,
    lengths: list[int],
    centred: bool,
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
        run(group, unit, inverse, weights, lengths, counts, start, picks)
    return picks


def unit_rows(x: Tensor, lengths: list[int], centred: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Rows to take cosines of, their inverse norms, and each row's distance to its span's mean.

    Centred rows are stored as unit vectors, in fp16 for 16-bit inputs (11 bits; bfloat16 has 8).
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
    """Row with the largest score in every span (0 in an empty one)."""
    best = [part.argmax() if len(part) else part.new_zeros((), dtype=torch.int64)
            for part in score.split(lengths)]  # fmt: skip
    return torch.stack(best)


def grouped(lengths: list[int]) -> list[list[int]]:
    """Spans that run together: consecutive ones within the memory for cosines, long ones alone."""
    found: list[list[int]] = []
    room = 0
    for span, length in enumerate(lengths):
        if length > MAX_GRAM_ROWS or length * length > room or not found:
            found.append([])
            room = GRAM_ELEMENTS if length <= MAX_GRAM_ROWS else 0
        found[-1].append(span)
        room -= length * length
    return found


def run(
    group: list[int],
    x: Tensor,
    inverse: Tensor,
    weights: Tensor | None,
    lengths: list[int],
    counts: list[int],
    start: Tensor,
    picks: Tensor,
) -> None:
    """Choose in the spans of one group."""
    longest = max(lengths[span] for span in group)
    first, last = group[0], group[-1] + 1
    row, pick = starts([*lengths, 0]), starts([*counts, 0])
    if longest > MAX_GRAM_ROWS:
        span = slice(row[first], row[last])
        given = None if weights is None else weights[span]
        run_steps(x[span], inverse[span], given, start[first:], picks[pick[first] : pick[last]])
        return
    squares = [lengths[span] * triton.cdiv(lengths[span], 16) * 16 for span in group]
    gram = torch.empty(sum(squares), dtype=torch.float32, device=x.device)
    rows = table(row[first : last + 1], x.device)
    grams = table(starts(squares), x.device, torch.int64)
    block, block_d, warps = gram_blocks(longest, x.element_size())
    tiles = triton.cdiv(longest, block)
    gram_kernel[(len(group), tiles, tiles)](
        x, inverse, rows, grams, gram, x.stride(0), x.shape[1],
        BLOCK=block, BLOCK_D=block_d, num_warps=warps, num_stages=3,
    )  # fmt: skip
    wide = padded(longest)
    greedy_kernel[(len(group),)](
        gram, rows, grams, table(pick[first : last + 1], x.device), start[first:], weights, picks,
        WEIGHTED=weights is not None, BLOCK=wide, num_warps=greedy_warps(wide),
    )  # fmt: skip


def run_steps(
    x: Tensor, inverse: Tensor, weights: Tensor | None, start: Tensor, picks: Tensor
) -> None:
    """Choose in one long span, a launch per step."""
    rows = len(x)
    block, block_d = 32, 128
    blocks = triton.cdiv(rows, block)
    nearest = torch.full_like(inverse, torch.inf)
    left = torch.ones_like(inverse) if weights is None else weights.clone()
    scores = torch.empty(2, blocks, dtype=torch.float32, device=x.device)
    winners = torch.empty(2, blocks, dtype=torch.int32, device=x.device)
    for step in range(len(picks)):
        new, old = step % 2, 1 - step % 2
        step_kernel[(blocks,)](
            x, inverse, left, nearest, scores[new], winners[new], scores[old], winners[old],
            picks, start, step, blocks, rows, x.stride(0), x.shape[1],
            BLOCK=block, BLOCK_D=block_d, BLOCK_B=padded(blocks), num_warps=4, num_stages=2,
        )  # fmt: skip


def gram_blocks(rows: int, itemsize: int) -> tuple[int, int, int]:
    """(rows, features, warps) of a tile of cosines."""
    if itemsize == 4:
        return 32, 32, 4
    return (64, 64, 4) if rows <= 1024 else (128, 32, 8)


def greedy_warps(block: int) -> int:
    """Warps of the program that owns a span: at most 16 values per thread."""
    return max(1, min(16, block // 256))
