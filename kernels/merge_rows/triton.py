"""Triton version of ``merge_rows``: one program per kept row gathers its members in row order.

Gathering instead of scattering makes atomics unnecessary, so the order of additions, and with it
the rounded result, does not depend on scheduling.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokencomp.kernels import checks

# In segments of up to this many rows a program finds the members of its kept row by scanning the
# targets. For longer segments the targets are sorted beforehand, and members are a range of them.
MAX_SCAN = 4096
NONE = tl.constexpr(2147483647)


@triton.jit
def merge_kernel(
    x, target, keep, sizes, begins, ends, order, out, new_sizes, stride, dim,
    SCAN: tl.constexpr, HAS_SIZES: tl.constexpr, WEIGHTED: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Merge the members of one kept row.

    The grid is (kept rows, blocks of features). SCAN selects between the two ways of finding the
    members, see ``MAX_SCAN``.
    """
    slot = tl.program_id(0)
    if SCAN:
        kept = tl.load(keep + slot)
        begin = tl.load(begins + kept)
        place = begin + tl.arange(0, BLOCK_S)
        inside = place < tl.load(ends + kept)
        into = tl.load(target + place, mask=inside, other=-1)
        # `waiting` holds the rows of members that are not merged yet and NONE elsewhere. Taking its
        # minimum in each step visits the members in row order.
        waiting = tl.where(inside & (into == kept), place, NONE)
        members = tl.sum((waiting != NONE).to(tl.int32), axis=0)
    else:
        # Members are rows order[begin:end], ascending, as the sort of targets is stable.
        begin = tl.load(begins + slot)
        members = tl.load(ends + slot) - begin
        waiting = tl.zeros([BLOCK_S], tl.int32)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_D], tl.float32)
    weights = 0.0
    size = 0.0
    # One member after the other: a fixed order of additions, in fp32.
    for number in range(members):
        if SCAN:
            row = tl.min(waiting, axis=0)
            waiting = tl.where(waiting == row, NONE, waiting)
        else:
            row = tl.load(order + begin + number).to(tl.int32)
        own = 1.0
        if HAS_SIZES:
            own = tl.load(sizes + row)
        weight = own if WEIGHTED else 1.0
        value = tl.load(x + row.to(tl.int64) * stride + d, mask=d < dim, other=0.0)
        total += value.to(tl.float32) * weight
        weights += weight
        size += own
    place_out = slot.to(tl.int64) * dim + d
    tl.store(out + place_out, (total / weights).to(out.dtype.element_ty), mask=d < dim)
    # The size is the same for all blocks of features; the first block writes it.
    if tl.program_id(1) == 0:
        tl.store(new_sizes + slot, size)


def merge_rows(
    x: Tensor,
    target: Tensor,
    keep: Tensor,
    sizes: Tensor | None,
    weighted: bool,
    lengths: list[int],
) -> tuple[Tensor, Tensor]:
    """See :func:`tokencomp.kernels.merge_rows.naive`."""
    checks.triton_dtype("x", x)
    x = checks.rows_contiguous(x)
    rows, dim = x.shape
    out = x.new_empty(len(keep), dim)
    new_sizes = torch.empty(len(keep), dtype=torch.float32, device=x.device)
    if len(keep) == 0:
        return out, new_sizes
    lengths = lengths or [rows]
    scan = max(lengths) <= MAX_SCAN
    order = target
    if scan:
        begins, ends = bounds(tuple(lengths), x.device)
    else:
        # Dropped rows (-1) come first and are in no range.
        ordered, order = torch.sort(target, stable=True)
        begins = torch.searchsorted(ordered, keep, out_int32=True)
        ends = torch.searchsorted(ordered, keep, right=True, out_int32=True)
    block_d, warps = blocks(dim, x.element_size())
    merge_kernel[(len(keep), triton.cdiv(dim, block_d))](
        x, target, keep, target if sizes is None else sizes, begins, ends, order,
        out, new_sizes, x.stride(0), dim,
        SCAN=scan, HAS_SIZES=sizes is not None, WEIGHTED=weighted,
        BLOCK_S=max(16, triton.next_power_of_2(max(lengths))) if scan else 16,
        BLOCK_D=block_d, num_warps=warps, num_stages=1,
    )  # fmt: skip
    return out, new_sizes


@functools.lru_cache(maxsize=16)
def bounds(lengths: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return begin and end (exclusive) of the segment of each row, int32 ``(n,)`` each, cached."""
    size = torch.tensor(lengths)
    end = size.cumsum(0)
    begins, ends = (edge.repeat_interleave(size).int().to(device) for edge in (end - size, end))
    return begins, ends


def blocks(dim: int, itemsize: int) -> tuple[int, int]:
    """Return (features, warps) of a program.

    A program takes a whole row if it fits, as every block of features repeats the search for
    members. Each thread loads 16 bytes at once.
    """
    block_d = min(4096, max(64, triton.next_power_of_2(dim)))
    return block_d, max(1, min(8, block_d * itemsize // 512))
