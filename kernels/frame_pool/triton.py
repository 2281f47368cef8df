"""Triton version of ``frame_pool``: one program per output token."""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokencomp.kernels import checks


@triton.jit
def pool_kernel(
    x, cells, out, stride_t, stride_y, stride_x, height, width, dim, BLOCK_D: tl.constexpr
):
    """Mean of the input cells that one output token covers.

    The grid is (output tokens, blocks of features). Frames have different grids, so `cells` gives
    frame, cell, grid rows and grid columns of each output token, and one launch serves all frames.
    """
    token = tl.program_id(0).to(tl.int64)
    frame = tl.load(cells + token * 4)
    cell = tl.load(cells + token * 4 + 1)
    rows = tl.load(cells + token * 4 + 2)
    columns = tl.load(cells + token * 4 + 3)
    i, j = cell // columns, cell % columns
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    x += frame.to(tl.int64) * stride_t
    # First input row and column, and how many: integer forms of floor and ceil, free of rounding.
    y0 = i * height // rows
    x0 = j * width // columns
    high = ((i + 1) * height + rows - 1) // rows - y0
    wide = ((j + 1) * width + columns - 1) // columns - x0
    total = tl.zeros([BLOCK_D], tl.float32)
    for tap in range(high * wide):
        y, column = y0 + tap // wide, x0 + tap % wide
        at = y.to(tl.int64) * stride_y + column.to(tl.int64) * stride_x
        total += tl.load(x + at + d, mask=d < dim, other=0.0).to(tl.float32)
    total /= high * wide
    tl.store(out + token * dim + d, total.to(out.dtype.element_ty), mask=d < dim)


def frame_pool(x: Tensor, heights: list[int], widths: list[int]) -> Tensor:
    """See :func:`tokencomp.kernels.frame_pool.naive`."""
    checks.triton_dtype("x", x)
    x = checks.rows_contiguous(x)
    _, height, width, dim = x.shape
    cells = cell_table(tuple(heights), tuple(widths), x.device)
    out = x.new_empty(len(cells), dim)
    if out.numel() == 0:
        return out
    block_d, warps = blocks(dim)
    pool_kernel[(len(cells), triton.cdiv(dim, block_d))](
        x, cells, out, *x.stride()[:3], height, width, dim, BLOCK_D=block_d, num_warps=warps
    )
    return out


@functools.lru_cache(maxsize=16)
def cell_table(heights: tuple[int, ...], widths: tuple[int, ...], device: torch.device) -> Tensor:
    """Return (frame, cell, grid rows, grid columns) of every output token, int32 ``(n, 4)``.

    The table is cached, because a model pools many videos of the same shape.
    """
    grid = torch.tensor([heights, widths], dtype=torch.int64).T
    # Grids 1×2 and 1×1: frame 0 0 1, cell 0 1 0.
    count = grid.prod(1)
    frame = torch.arange(len(grid)).repeat_interleave(count)
    cell = torch.arange(len(frame)) - (count.cumsum(0) - count)[frame]
    columns = torch.column_stack([frame, cell, grid[frame]])
    return columns.to(torch.int32).to(device)


def blocks(dim: int) -> tuple[int, int]:
    """Return (features, warps) of a program, so that each thread loads 16 bytes at once."""
    block_d = min(1024, max(64, triton.next_power_of_2(dim)))
    while block_d > 256 and dim % block_d:  # a divisor leaves no lane idle
        block_d //= 2
    return block_d, max(1, min(4, block_d // 256))
