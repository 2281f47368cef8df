"""Triton kernels that read every row once: norms, means, and the first choice of every span."""

import itertools

import torch
import triton
import triton.language as tl
from tokencomp.kernels.maxmin_select.rounds import TIED
from torch import Tensor

from tokencomp.kernels.checks import table
from tokencomp.kernels.tile import inverse_root

# Rows and features of a tile of a mean.
MEAN_BLOCK = (32, 64)


@triton.jit
def norm_kernel(
    x, mean, span_of, inverse, far, stride, dim,
    BLOCK_D: tl.constexpr, RMS: tl.constexpr = False,
):  # fmt: skip
    """Compute 1/norm of one row, and its distance to the mean of its span.

    The grid is (rows,). No unit vector is stored: the products read `x` itself and apply the
    inverse norms afterwards, which saves a copy of the features.
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
    # A tile of partial sums, added up once at the end: no sum over rows within the loop.
    total = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    for begin in range(start, stop, BLOCK_R):
        row = begin + tl.arange(0, BLOCK_R)
        mask = (row < stop)[:, None] & (d < dim)[None, :]
        at = x + row.to(tl.int64)[:, None] * stride + d[None, :]
        value = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        if SCALED:
            value *= tl.load(scale + row, mask=row < stop, other=0.0)[:, None]
        total += value
    # A span without rows has the mean 0, not NaN.
    count = tl.maximum(stop - start, 1)
    tl.store(mean + span.to(tl.int64) * dim + d, tl.sum(total, axis=0) / count, mask=d < dim)


@triton.jit
def first_kernel(score, first_row, first, BLOCK: tl.constexpr, TIED: tl.constexpr):
    """Find the first row of every span whose score ties with the largest (0 without rows).

    The grid is (spans,).
    """
    span = tl.program_id(0)
    start = tl.load(first_row + span)
    rows = tl.load(first_row + span + 1) - start
    # Two walks, as the line of a tie depends on the largest score of all.
    best = -float("inf")
    for begin in range(0, rows, BLOCK):
        row = begin + tl.arange(0, BLOCK)
        value = tl.load(score + start + row, mask=row < rows, other=-float("inf"))
        best = tl.maximum(best, tl.max(value, axis=0))
    # For a negative best score, best * TIED lies above it, and no row would reach the line.
    line = tl.minimum(best, best * TIED)
    place = rows
    for begin in range(0, rows, BLOCK):
        row = begin + tl.arange(0, BLOCK)
        value = tl.load(score + start + row, mask=row < rows, other=-float("inf"))
        tie = (row < rows) & (value >= line)
        place = tl.minimum(place, tl.min(tl.where(tie, row, rows), axis=0))
    tl.store(first + span, place.to(tl.int64))


def inverse_norms(x: Tensor, lengths: list[int], rms: bool = False) -> tuple[Tensor, Tensor]:
    """Return the inverse norms of all rows, and their distances to the mean of their span.

    Both are fp32 ``(n,)``. With `rms` the distances are sums of squared differences, whose order is
    the same.
    """
    rows, dim = x.shape
    mean = means(x, None, lengths)
    inverse = torch.empty(rows, dtype=torch.float32, device=x.device)
    far = torch.empty_like(inverse)
    span_of = torch.repeat_interleave(table(lengths, x.device, torch.int64), output_size=rows)
    block_d = min(4096, triton.next_power_of_2(max(dim, 64)))
    norm_kernel[(rows,)](
        x, mean, span_of, inverse, far, x.stride(0), dim, BLOCK_D=block_d, RMS=rms,
        num_warps=max(1, min(8, block_d // 256)),
    )  # fmt: skip
    return inverse, far


def means(x: Tensor, scale: Tensor | None, lengths: list[int]) -> Tensor:
    """Return the mean of the rows of every span, each times its `scale`, fp32 ``(spans, D)``."""
    mean = torch.empty(len(lengths), x.shape[1], dtype=torch.float32, device=x.device)
    first_row = table([0, *itertools.accumulate(lengths)], x.device)
    mean_kernel[(len(lengths), triton.cdiv(x.shape[1], MEAN_BLOCK[1]))](
        x, x if scale is None else scale, first_row, mean, x.stride(0), x.shape[1],
        SCALED=scale is not None, BLOCK_R=MEAN_BLOCK[0], BLOCK_D=MEAN_BLOCK[1], num_warps=4,
    )  # fmt: skip
    return mean


def first_choice(score: Tensor, lengths: list[int], tied: float = TIED) -> Tensor:
    """Return the first row of every span that ties with its largest score (0 if it is empty).

    A score ties if it has at least the share `tied` of the largest one.
    """
    first = torch.zeros(len(lengths), dtype=torch.int64, device=score.device)
    first_row = table([0, *itertools.accumulate(lengths)], score.device)
    first_kernel[(len(lengths),)](score, first_row, first, BLOCK=1024, TIED=tied, num_warps=4)
    return first
