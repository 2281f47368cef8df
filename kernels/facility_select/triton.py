"""Triton version of ``facility_select``.

One launch computes how well every row of a span covers every point of it. A second one has one
program per span, which takes all steps on the device: no step waits for the host, and the number of
launches depends neither on the spans nor on the choices. It computes all gains in every step, where
the plain version is lazy: to skip a gain costs a program more than to compute it.
"""

import torch
import triton
import triton.language as tl
from tokencomp.kernels.facility_select import DENSE_ENTRIES, ROUNDING, naive
from tokencomp.kernels.maxmin_select.rounds import TIED
from torch import Tensor

from tokencomp.kernels import checks
from tokencomp.kernels.checks import starts, table
from tokencomp.kernels.tile import full_dot, padded

# Rows of a span whose gains one program compares in its registers.
MAX_ROWS = 8192
# A program reads count · rows · points coverings of its span. Beyond this product the plain version
# is faster by our estimate: no GPU has measured it.
MAX_WORK = 1 << 30


@triton.jit
def cover_kernel(
    unit, points, offset, first_row, first_point, first_cover, cover, stride, point_stride, dim,
    SOFTMAX: tl.constexpr, LEAST: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Compute one tile of the coverings of a span, whose rows and points are those of the matrix.

    They are products of at least LEAST, or with SOFTMAX their exponentials, and the products of all
    pairs of rows if LEAST is -inf. The grid is (spans, tiles of rows, tiles of points) for the
    longest span. Products are taken in full fp32, so that copies of a row cover as much as the row.
    """
    span = tl.program_id(0)
    start = tl.load(first_row + span)
    rows = tl.load(first_row + span + 1) - start
    begin = tl.load(first_point + span)
    reach = tl.load(first_point + span + 1) - begin
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    j = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    if (tl.program_id(1) * BLOCK < rows) & (tl.program_id(2) * BLOCK < reach):
        left = unit + (start + i).to(tl.int64) * stride
        right = points + (begin + j).to(tl.int64) * point_stride
        dots = full_dot(left, i < rows, right, j < reach, dim, BLOCK, BLOCK_D)
        if SOFTMAX:
            dots = tl.exp(dots - tl.load(offset + begin + j, mask=j < reach, other=0.0)[None, :])
        # Rows of coverings begin at multiples of 16, so that loads are wide; the rest holds 0,
        # which never exceeds a covering and so adds no gain.
        pitch = (reach + 15) // 16 * 16
        place = tl.load(first_cover + span) // 16 * 16 + i.to(tl.int64)[:, None] * pitch
        tl.store(
            cover + place + j[None, :],
            tl.where((j < reach)[None, :], tl.maximum(dots, LEAST), 0.0),
            mask=(i < rows)[:, None] & (j < pitch)[None, :],
        )


@triton.jit
def facility_kernel(
    cover, weights, first_row, first_point, first_cover, first_best, first_pick, best, gains, picks,
    WEIGHTED: tl.constexpr, TIED: tl.constexpr, ROUNDING: tl.constexpr,
    ROWS: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Take all steps of one span. The grid is (spans,).

    `best` holds the covering of every point by the chosen rows, and `gains` those of one step.
    """
    span = tl.program_id(0)
    start = tl.load(first_row + span)
    rows = tl.load(first_row + span + 1) - start
    reach = tl.load(first_point + span + 1) - tl.load(first_point + span)
    pitch = (reach + 15) // 16 * 16
    begin = tl.load(first_pick + span)
    count = tl.load(first_pick + span + 1) - begin
    cover += tl.load(first_cover + span) // 16 * 16
    best += tl.load(first_best + span) // 16 * 16
    gains += start
    # Gains go through memory: a tile has 16 rows, the comparison needs all rows in one vector.
    row = tl.arange(0, ROWS)
    free = row < rows
    weight = tl.full([ROWS], 1.0, tl.float32)
    if WEIGHTED:
        weight = tl.load(weights + start + row, mask=free, other=0.0)
    for step in range(count):
        # 16 rows at a time over all points, so that the sum of a row stays in a register.
        for first in range(0, rows, TILE):
            j = first + tl.arange(0, TILE)
            total = tl.zeros([TILE], tl.float32)
            for chunk in range(0, pitch, CHUNK):
                i = chunk + tl.arange(0, CHUNK)
                now = tl.load(best + i, mask=i < pitch, other=0.0)[None, :]
                at = cover + j.to(tl.int64)[:, None] * pitch + i[None, :]
                own = tl.load(at, mask=(j < rows)[:, None] & (i < pitch)[None, :], other=0.0)
                total += tl.sum(tl.where(own > now * (1.0 + ROUNDING), own - now, 0.0), axis=1)
            tl.store(gains + j, total, mask=j < rows)
        tl.debug_barrier()  # other threads of the program wrote these gains
        gain = tl.load(gains + row, mask=row < rows, other=0.0)
        # Gains are at least 0, so -1 is never the best while a row is free.
        score = tl.where(free, gain * weight, -1.0)
        line = tl.max(score, axis=0) * TIED
        chosen = tl.min(tl.where(score >= line, row, ROWS), axis=0)  # the first of those that tie
        tl.store(picks + begin + step, (start + chosen).to(tl.int64))
        free = free & (row != chosen)
        for chunk in range(0, pitch, CHUNK):
            i = chunk + tl.arange(0, CHUNK)
            own = tl.load(cover + chosen.to(tl.int64) * pitch + i, mask=i < pitch, other=0.0)
            now = tl.load(best + i, mask=i < pitch, other=0.0)
            tl.store(best + i, tl.maximum(now, own), mask=i < pitch)
        tl.debug_barrier()  # other threads of the program read these coverings in the next step


def fits(counts: list[int], lengths: list[int], reach: list[int]) -> bool:
    """Whether one program can compare the rows of each span, and should not take too long."""
    triples = list(zip(counts, lengths, reach, strict=True))
    small = all(n <= MAX_ROWS and n * m <= DENSE_ENTRIES for _, n, m in triples)
    return small and all(k * n * m <= MAX_WORK for k, n, m in triples)


def facility_select(
    unit: Tensor,
    counts: list[int],
    weights: Tensor | None,
    lengths: list[int],
    points: Tensor | None,
    reach: list[int],
    offset: Tensor | None,
) -> Tensor:
    """See :func:`tokencomp.kernels.facility_select.naive`; it runs large spans."""
    if unit.dtype != torch.float32 or not fits(counts, lengths, reach):
        return naive(unit, counts, weights, lengths, points, reach, offset)
    unit = checks.rows_contiguous(unit)
    # Without points, rows cover one another, and tables of rows serve as those of points.
    points = unit if points is None else checks.rows_contiguous(points)
    device, longest = unit.device, max(lengths, default=0)
    picks = torch.empty(sum(counts), dtype=torch.int64, device=device)
    if len(picks) == 0:
        return picks
    pitches = [triton.cdiv(m, 16) * 16 for m in reach]
    sizes = [n * pitch for n, pitch in zip(lengths, pitches, strict=True)]
    cover = torch.empty(sum(sizes), dtype=torch.float32, device=device)
    best = torch.zeros(sum(pitches), dtype=torch.float32, device=device)
    first_row, first_point = (table(starts([*n, 0]), device) for n in (lengths, reach))
    first_cover = table(starts(sizes), device, torch.int64)
    tiles = triton.cdiv(longest, 32), triton.cdiv(max(pitches), 32)
    cover_kernel[(len(lengths), *tiles)](
        unit, points, unit if offset is None else offset, first_row, first_point, first_cover,
        cover, unit.stride(0), points.stride(0), unit.shape[1],
        SOFTMAX=offset is not None, LEAST=0.0, BLOCK=32, BLOCK_D=32, num_warps=4,
    )  # fmt: skip
    facility_kernel[(len(lengths),)](
        cover, unit if weights is None else weights, first_row, first_point, first_cover,
        table(starts(pitches), device, torch.int64), table(starts([*counts, 0]), device), best,
        torch.empty(len(unit), dtype=torch.float32, device=device), picks,
        WEIGHTED=weights is not None, TIED=TIED, ROUNDING=ROUNDING,
        ROWS=padded(longest), TILE=16, CHUNK=min(256, padded(max(pitches))), num_warps=8,
    )  # fmt: skip
    return picks.sort().values
