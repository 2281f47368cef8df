"""Triton version of ``dpp_select``.

One launch computes the products of all pairs of rows of every span. A second one has one program
per span, which takes all steps of the Cholesky factorisation on the device: no step waits for the
host, and the number of launches depends neither on the spans nor on the choices.
"""

import torch
import triton
import triton.language as tl
from tokencomp.kernels.dpp_select import EPSILON, naive
from tokencomp.kernels.facility_select.triton import cover_kernel
from torch import Tensor

from tokencomp.kernels import checks
from tokencomp.kernels.checks import starts, table
from tokencomp.kernels.tile import padded

# Rows of a span that one program holds in its registers.
MAX_ROWS = 4096
# A program reads count² · rows / 2 factors of its span. Beyond this product the plain version,
# which spreads every step over the GPU, is faster by our estimate: no GPU has measured it.
MAX_WORK = 1 << 31


@triton.jit
def cholesky_kernel(
    gram, relevance, first_row, first_gram, first_pick, first_factor, factors, picks,
    LEAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Take all steps of one span. The grid is (spans,).

    `gain` is what each row would add to the determinant, and `factors` holds one row of the
    Cholesky factor per step. Both are those of the plain version.
    """
    span = tl.program_id(0)
    start = tl.load(first_row + span)
    rows = tl.load(first_row + span + 1) - start
    begin = tl.load(first_pick + span)
    count = tl.load(first_pick + span + 1) - begin
    pitch = (rows + 15) // 16 * 16
    gram += tl.load(first_gram + span) // 16 * 16
    factors += tl.load(first_factor + span) // 16 * 16
    row = tl.arange(0, BLOCK)
    # The mask of loads reaches up to the pitch: in units of 16 it lets them be wide.
    held = row < pitch
    # All rows of the span are in registers (at most MAX_ROWS): relevance, gain and `free`.
    r = tl.load(relevance + start + row, mask=row < rows, other=1.0)
    gain = r * r
    least = LEAST * gain
    free = row < rows
    for step in range(count):
        # Directions that are used up rank below all others, by relevance: -1 / r is negative.
        score = tl.where(gain > least, gain, -1.0 / r)
        best = tl.argmax(tl.where(free, score, -float("inf")), axis=0, tie_break_left=True)
        tl.store(picks + begin + step, (start + best).to(tl.int64))
        own = tl.load(relevance + start + best)
        # Element `best` of a vector in registers: the sum has one term other than 0.
        left = tl.sum(tl.where(row == best, gain, 0.0), axis=0)
        free = free & (row != best)
        # Row of K of the new choice, from the products of the first launch.
        value = own * r * tl.load(gram + best.to(tl.int64) * pitch + row, mask=held, other=0.0)
        factor = factors
        # Subtract what each earlier factor explains, in the order of the choices.
        for _ in range(step):
            value -= tl.load(factor + best) * tl.load(factor + row, mask=held, other=0.0)
            factor += pitch
        # Factors after the last row are 0, as later steps read them up to the pitch.
        value = tl.where(row < rows, value / tl.sqrt(tl.maximum(left, 1e-20)), 0.0)
        value = tl.where(left > LEAST * own * own, value, 0.0)
        tl.store(factor + row, value, mask=held)
        gain -= value * value
        tl.debug_barrier()  # other threads of the program read these factors in the next step


def fits(counts: list[int], lengths: list[int]) -> bool:
    """Whether one program can hold each span, and should be faster than the plain version."""
    pairs = zip(counts, lengths, strict=True)
    return all(n <= MAX_ROWS and k * k * n <= MAX_WORK for k, n in pairs)


def dpp_select(unit: Tensor, counts: list[int], relevance: Tensor, lengths: list[int]) -> Tensor:
    """See :func:`tokencomp.kernels.dpp_select.naive`, which runs what does not fit."""
    if unit.dtype == torch.float64 or not fits(counts, lengths):
        return naive(unit, counts, relevance, lengths)
    unit = checks.rows_contiguous(unit)
    device, longest = unit.device, max(lengths, default=0)
    picks = torch.empty(sum(counts), dtype=torch.int64, device=device)
    if len(picks) == 0:
        return picks
    pitches = [triton.cdiv(length, 16) * 16 for length in lengths]
    squares = [n * pitch for n, pitch in zip(lengths, pitches, strict=True)]
    steps = [k * pitch for k, pitch in zip(counts, pitches, strict=True)]
    gram = torch.empty(sum(squares), dtype=torch.float32, device=device)
    factors = torch.empty(sum(steps), dtype=torch.float32, device=device)
    first_row = table(starts([*lengths, 0]), device)
    first_gram = table(starts(squares), device, torch.int64)
    tiles = triton.cdiv(longest, 32)
    # Three tf32 products would leave an error of the size of EPSILON, which detects copies.
    cover_kernel[(len(lengths), tiles, tiles)](
        unit, unit, unit, first_row, first_row, first_gram, gram, unit.stride(0), unit.stride(0),
        unit.shape[1], SOFTMAX=False, LEAST=-float("inf"), BLOCK=32, BLOCK_D=32, num_warps=4,
    )  # fmt: skip
    block = padded(longest)
    cholesky_kernel[(len(lengths),)](
        gram, relevance, first_row, first_gram, table(starts([*counts, 0]), device),
        table(starts(steps), device, torch.int64), factors, picks,
        LEAST=EPSILON, BLOCK=block, num_warps=max(1, min(16, block // 256)),
    )  # fmt: skip
    return picks.sort().values
