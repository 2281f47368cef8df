"""Triton version of ``attention_colsum``.

The kernels make two passes over the keys. The first pass computes the log-sum-exp of every probe
row. Query heads that share a key head are stacked as rows of one tile, so that a key is read once
for its whole group. Long key ranges are split between programs, so that even one row with 16k keys
fills the GPU. In the second pass each program owns a block of keys and loops over the rows, so that
its sums need no atomics and are deterministic.
"""

import torch
import triton
import triton.language as tl
from tokencomp.kernels.attention_colsum import repeated
from torch import Tensor

from tokencomp.kernels import checks
from tokencomp.kernels.tile import (
    LOG2E,
    aligned,
    alignment,
    dot,
    log_sum,
    long_dot,
    multiprocessors,
    padded,
)

MAX_HEAD_DIM = 256
# From this number of probe rows on, the column pass computes in advance which row blocks can see a
# key block, and spreads heads over programs instead of looping over them. With fewer rows the
# look-up would cost more than it saves.
MANY_ROWS = 256


# Tiles of the first pass: GROUP 2, 3 rows, one key head, BLOCK_R 4, so two tiles of pairs.
#     item            0  1  2  3 | 4  5  -  -     - is outside: no load, no store
#     head, row       0  0  0  1 | 1  1
#                     0  1  2  0 | 1  2
# Each tile reads keys `begin` to `end`, the union of what its rows see, in SPLITS shares.
@triton.jit
def lse_kernel(
    q, k, lo, hi, out, scale,
    stride_qb, stride_qh, stride_qr, stride_kb, stride_kh, stride_kn,
    rows, kv_heads, split_stride,
    GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, CHUNK: tl.constexpr, SPLITS: tl.constexpr,
    ALIGN: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp of BLOCK_R pairs (query head of the group, row) over one split of their keys.

    The grid is (tiles of pairs, samples × key heads, splits). The kernel keeps a running maximum
    and a running sum (online softmax), so that it reads each key tile once.
    """
    sample = tl.program_id(1) // kv_heads
    kv_head = tl.program_id(1) % kv_heads
    split = tl.program_id(2)
    item = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = item < GROUP * rows
    row = item % rows
    head = kv_head * GROUP + item // rows
    low = tl.load(lo + sample.to(tl.int64) * rows + row, mask=inside, other=0)
    high = tl.load(hi + sample.to(tl.int64) * rows + row, mask=inside, other=0)
    # The tile reads the union of its rows' key ranges; rows that see no key do not widen it.
    begin = tl.min(tl.where(high > low, low, 2147483647), axis=0)
    end = tl.max(high, axis=0)
    begin = tl.minimum(begin, end)
    # Whole key blocks per split; the last splits may be empty and then give -inf.
    share = (end - begin + SPLITS - 1) // SPLITS
    share = (share + BLOCK_N - 1) // BLOCK_N * BLOCK_N
    begin += split * share
    end = tl.minimum(end, begin + share)

    stride_qb, stride_qh, stride_qr = aligned(stride_qb, stride_qh, stride_qr, ALIGN)
    stride_kb, stride_kh, stride_kn = aligned(stride_kb, stride_kh, stride_kn, ALIGN)
    d = tl.arange(0, BLOCK_D)
    q_row = q + sample.to(tl.int64) * stride_qb + head.to(tl.int64) * stride_qh
    q_row += row.to(tl.int64) * stride_qr
    # 16-bit queries stay in registers for all key tiles. Rows in fp32 are too large for that, and
    # `long_dot` reads them again for every key tile, CHUNK columns at a time.
    if CHUNK == BLOCK_D:
        q_tile = tl.load(
            q_row[:, None] + d[None, :], mask=inside[:, None] & (d[None, :] < DIM), other=0.0
        )
    k += sample.to(tl.int64) * stride_kb + kv_head.to(tl.int64) * stride_kh
    top = tl.full([BLOCK_R], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    for first in range(begin, end, BLOCK_N):
        column = first + tl.arange(0, BLOCK_N)
        k_row = k + column.to(tl.int64) * stride_kn
        logits = tl.zeros([BLOCK_R, BLOCK_N], tl.float32)
        if CHUNK == BLOCK_D:
            k_tile = tl.load(
                k_row[:, None] + d[None, :],
                mask=(column < end)[:, None] & (d[None, :] < DIM),
                other=0.0,
            )
            logits = dot(q_tile, tl.trans(k_tile), logits)
        else:
            logits = long_dot(q_row, inside, k_row, column < end, logits, DIM, CHUNK)
        logits *= scale
        seen = (column[None, :] >= low[:, None]) & (column[None, :] < high[:, None])
        seen = seen & (column[None, :] < end)
        # Keys that only other rows of the tile see.
        logits = tl.where(seen, logits, -float("inf"))
        new_top = tl.maximum(top, tl.max(logits, axis=1))
        # As long as a row has seen no key its maximum is -inf, and -inf - -inf would be NaN.
        shift = tl.where(new_top == -float("inf"), 0.0, new_top)
        # The sum so far refers to the old maximum.
        total = total * tl.exp2((top - shift) * LOG2E)
        total += tl.sum(tl.exp2((logits - shift[:, None]) * LOG2E), axis=1)
        top = new_top
    result = log_sum(top, total)
    place = (sample.to(tl.int64) * kv_heads * GROUP + head) * rows + row
    tl.store(out + split.to(tl.int64) * split_stride + place, result, mask=inside)


# The log-sum-exp of all keys is the log-sum-exp of the values of the splits: two splits with
# log 2 and log 3 give log 5.
@triton.jit
def combine_kernel(partial, out, count, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """Combine the log-sum-exp values of all splits of every row."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    top = tl.full([BLOCK], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    at = place
    for _ in range(SPLITS):
        value = tl.load(partial + at, mask=inside, other=0.0)
        new_top = tl.maximum(top, value)
        shift = tl.where(new_top == -float("inf"), 0.0, new_top)
        total = total * tl.exp2((top - shift) * LOG2E) + tl.exp2((value - shift) * LOG2E)
        top = new_top
        at += count
    tl.store(out + place, log_sum(top, total), mask=inside)


@triton.jit
def colsum_kernel(
    q, k, weights, lse, lo, hi, first_block, last_block, out, scale,
    stride_qb, stride_qh, stride_qr, stride_kb, stride_kh, stride_kn,
    rows, keys, kv_heads, row_blocks,
    GROUP: tl.constexpr, HEADS: tl.constexpr, BOUNDED: tl.constexpr,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Column sums of BLOCK_N keys for HEADS query heads of one key head.

    The program owns its keys: it holds their tile in registers and loops over the row blocks, so
    every output element is written once. BOUNDED limits the loop to ``first_block[…] …
    last_block[…]``, the row blocks that can see these keys (half of them under a causal mask).
    """
    block = tl.program_id(0)
    parts = kv_heads * (GROUP // HEADS)
    sample = tl.program_id(1) // parts
    part = tl.program_id(1) % parts
    kv_head = part * HEADS // GROUP
    column = block * BLOCK_N + tl.arange(0, BLOCK_N)
    stride_qb, stride_qh, stride_qr = aligned(stride_qb, stride_qh, stride_qr, ALIGN)
    stride_kb, stride_kh, stride_kn = aligned(stride_kb, stride_kh, stride_kn, ALIGN)
    d = tl.arange(0, BLOCK_D)
    k += sample.to(tl.int64) * stride_kb + kv_head.to(tl.int64) * stride_kh
    k_row = k + column.to(tl.int64) * stride_kn
    if CHUNK == BLOCK_D:
        k_tile = tl.load(
            k_row[:, None] + d[None, :],
            mask=(column < keys)[:, None] & (d[None, :] < DIM),
            other=0.0,
        )
    start, stop = 0, row_blocks
    if BOUNDED:
        start = tl.load(first_block + sample * tl.num_programs(0) + block)
        stop = tl.load(last_block + sample * tl.num_programs(0) + block)
    lo += sample.to(tl.int64) * rows
    hi += sample.to(tl.int64) * rows
    q += sample.to(tl.int64) * stride_qb
    for offset in range(HEADS):
        head = part * HEADS + offset
        at = (sample.to(tl.int64) * kv_heads * GROUP + head) * rows
        sums = tl.zeros([BLOCK_N], tl.float32)
        for step in range(start, stop):
            row = step * BLOCK_R + tl.arange(0, BLOCK_R)
            inside = row < rows
            q_row = q + head.to(tl.int64) * stride_qh + row.to(tl.int64) * stride_qr
            # Transposed, keys × rows: the key tile, which stays, is the left operand.
            logits = tl.zeros([BLOCK_N, BLOCK_R], tl.float32)
            if CHUNK == BLOCK_D:
                q_tile = tl.load(
                    q_row[:, None] + d[None, :],
                    mask=inside[:, None] & (d[None, :] < DIM),
                    other=0.0,
                )
                logits = dot(k_tile, tl.trans(q_tile), logits)
            else:
                logits = long_dot(k_row, column < keys, q_row, inside, logits, DIM, CHUNK)
            low = tl.load(lo + row, mask=inside, other=0)
            high = tl.load(hi + row, mask=inside, other=0)
            norm = tl.load(lse + at + row, mask=inside, other=0.0)
            weight = tl.load(weights + at + row, mask=inside, other=0.0)
            # A row with an infinite log-sum-exp is ignored, but NaN must reach the result.
            live = (norm != -float("inf")) & (norm != float("inf"))
            norm = tl.where(live, norm, 0.0)
            high = tl.where(live, high, 0)
            logits *= scale
            seen = (column[:, None] >= low[None, :]) & (column[:, None] < high[None, :])
            # Probabilities, with the log-sum-exp of all keys of the row as denominator.
            share = tl.where(seen, (logits - norm[None, :]) * LOG2E, -float("inf"))
            sums += tl.sum(tl.exp2(share) * weight[None, :], axis=1)
        place = (sample.to(tl.int64) * kv_heads * GROUP + head) * keys + column
        tl.store(out + place, sums, mask=column < keys)


def attention_colsum(
    q: Tensor, k: Tensor, weights: Tensor, visible: Tensor, scale: float, iterations: int
) -> Tensor:
    """See :func:`tokencomp.kernels.attention_colsum.naive`."""
    checks.triton_heads(q, MAX_HEAD_DIM)
    q, k = checks.rows_contiguous(q), checks.rows_contiguous(k)
    return repeated(column_sums, attention_lse, q, k, weights, visible, scale, iterations)


def attention_lse(q: Tensor, k: Tensor, lo: Tensor, hi: Tensor, scale: float) -> Tensor:
    """See :func:`tokencomp.kernels.attention_colsum.attention_lse`."""
    batch, heads, rows, dim = q.shape
    kv_heads, keys = k.shape[1:3]
    group = heads // kv_heads
    out = torch.full((batch, heads, rows), -torch.inf, dtype=torch.float32, device=q.device)
    if out.numel() == 0 or keys == 0:
        return out
    block_r, block_n, warps = lse_blocks(group * rows, dim, q.element_size())
    tiles = triton.cdiv(group * rows, block_r)
    splits = split_count(tiles * batch * kv_heads, triton.cdiv(keys, block_n), q.device)
    # (splits, B, Hq, R), or the result itself.
    partial = out if splits == 1 else out.new_empty(splits, *out.shape)
    lse_kernel[(tiles, batch * kv_heads, splits)](
        q, k, lo, hi, partial, scale, *q.stride()[:3], *k.stride()[:3],
        rows, kv_heads, out.numel(),
        GROUP=group, DIM=dim, BLOCK_D=padded(dim), BLOCK_R=block_r, BLOCK_N=block_n,
        CHUNK=chunk(dim, q.element_size()), SPLITS=splits,
        ALIGN=alignment(q, k), num_warps=warps, num_stages=3,
    )  # fmt: skip
    if splits > 1:
        grid = (triton.cdiv(out.numel(), 256),)
        combine_kernel[grid](partial, out, out.numel(), SPLITS=splits, BLOCK=256, num_warps=4)
    return out


def column_sums(
    q: Tensor, k: Tensor, weights: Tensor, lo: Tensor, hi: Tensor, lse: Tensor | None, scale: float
) -> Tensor:
    """See :func:`tokencomp.kernels.attention_colsum.column_sums`."""
    batch, heads, rows, dim = q.shape
    kv_heads, keys = k.shape[1:3]
    group = heads // kv_heads
    out = torch.zeros((batch, heads, keys), dtype=torch.float32, device=q.device)
    if out.numel() == 0 or rows == 0:
        return out
    if lse is None:
        lse = attention_lse(q, k, lo, hi, scale)
    block_r, block_n, warps = colsum_blocks(rows, dim, q.element_size())
    many = rows >= MANY_ROWS
    first, last = row_block_bounds(lo, hi, block_r, block_n, keys) if many else (lo, lo)
    per_program = 1 if many else group
    grid = (triton.cdiv(keys, block_n), batch * heads // per_program)
    colsum_kernel[grid](
        q, k, weights, lse, lo, hi, first, last, out, scale, *q.stride()[:3], *k.stride()[:3],
        rows, keys, kv_heads, triton.cdiv(rows, block_r),
        GROUP=group, HEADS=per_program, BOUNDED=many, DIM=dim, BLOCK_D=padded(dim),
        BLOCK_R=block_r, BLOCK_N=block_n, CHUNK=chunk(dim, q.element_size()),
        ALIGN=alignment(q, k), num_warps=warps, num_stages=3 if many else 2,
    )  # fmt: skip
    return out


# Six causal rows and keys, blocks of two rows and two keys:
#     keys a row sees up to (hi)   1 2 | 3 4 | 5 6
#     reach of row blocks           2  |  4  |  6     the first block that sees keys 0, 2, 4: 0 1 2
#     begin of row blocks           0  |  0  |  0     one past the last: 3 3 3
def row_block_bounds(
    lo: Tensor, hi: Tensor, block_r: int, block_n: int, keys: int
) -> tuple[Tensor, Tensor]:
    """Return the first and one past the last row block that can see each key block.

    Both are int32 ``(B, key blocks)``. For any order of rows, no row block outside of the bounds
    sees a key of the block; for ascending rows the bounds are tight.
    """
    # Padding rows, and rows that see no key, must not widen a block: low = keys, high = 0.
    pad = -lo.shape[1] % block_r
    seen = hi > lo
    low = torch.nn.functional.pad(lo.masked_fill(~seen, keys), (0, pad), value=keys)
    high = torch.nn.functional.pad(hi.masked_fill(~seen, 0), (0, pad), value=0)
    # `reach` is the largest visible column of any row block so far and `begin` the smallest of any
    # row block from here on. Both are monotone, so that one binary search finds each bound.
    reach = high.unflatten(1, (-1, block_r)).amax(2).cummax(1).values
    begin = low.unflatten(1, (-1, block_r)).amin(2).flip(1).cummin(1).values.flip(1)
    edges = torch.arange(0, keys, block_n, device=lo.device, dtype=lo.dtype)
    edges = edges.expand(len(lo), -1).contiguous()
    first = torch.searchsorted(reach.contiguous(), edges, right=True)
    last = torch.searchsorted(begin.contiguous(), edges + block_n)
    return first.int(), last.int()


def chunk(dim: int, itemsize: int) -> int:
    """Return how many head columns a product loads at once: 32 in fp32, otherwise all of them."""
    return min(padded(dim), 32) if itemsize == 4 else padded(dim)


def lse_blocks(items: int, dim: int, itemsize: int) -> tuple[int, int, int]:
    """Return (rows, keys, warps) of a tile of the first pass.

    Small row counts take the smallest tile that ``tl.dot`` allows (16 rows), as padding rows would
    be multiplied for nothing. Larger heads and fp32 take smaller tiles, which the registers hold.
    """
    if itemsize == 4:
        return 16 if items <= 16 else 32, 64, 4
    wide = padded(dim)
    if items <= 16:
        return 16, 64 if wide > 128 else 128, 4
    if items <= 64 or wide > 128:
        return 64, 64, 4
    return 128, 64, 8


def colsum_blocks(rows: int, dim: int, itemsize: int) -> tuple[int, int, int]:
    """Return (rows, keys, warps) of a tile of the second pass.

    The key tile stays in registers, so it shrinks where head columns are many or fp32.
    """
    wide = padded(dim)
    if rows <= 64 or itemsize == 4:
        return 16 if rows <= 16 or itemsize == 4 else 32, 64, 4
    return 64, 128 if wide <= 128 else 64, 8 if wide <= 128 else 4


def split_count(programs: int, blocks: int, device: torch.device) -> int:
    """Return into how many programs the keys of one tile are split, a power of two.

    The splits fill the GPU with about four programs per multiprocessor, but each split keeps at
    least two key blocks, as shorter ones would spend their time on starting and combining.
    """
    target = triton.cdiv(4 * multiprocessors(device), programs)
    limit = max(1, min(64, blocks // 2))
    splits = 1
    while splits < target and splits * 2 <= limit:
        splits *= 2
    return splits
