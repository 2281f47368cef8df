"""Triton version of ``ccam_attention``: an online softmax that reads visible keys only."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokencomp.kernels import checks
from tokencomp.kernels.tile import LOG2E, aligned, alignment, dot, log_sum, multiprocessors, padded

MAX_HEAD_DIM = 128


@triton.jit(do_not_specialize=["frames"])
def ccam_kernel(
    q, k, v, frames, out, lse, scale,
    stride_qb, stride_qh, stride_qi, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn, queries, per_frame, heads, split_keys,
    CAUSAL: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Attend BLOCK_Q queries to one split of the keys; write their normalised sum and LSE.

    The grid is (query blocks, samples × heads, splits). With few queries there are too few programs
    to fill the GPU, so the keys are split too and ``combine_kernel`` joins the splits by their LSE.
    """
    # The last queries see the most keys. Their programs start first, so that the long ones do not
    # run alone at the end.
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    sample = tl.program_id(1) // heads
    head = tl.program_id(1) % heads
    split = tl.program_id(2)
    query = block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    inside = query < queries
    # Number of keys that each query sees, (BLOCK_Q,): a prefix, so one limit is the whole mask.
    if CAUSAL:
        limit = tl.minimum(query * frames // queries + 1, frames) * per_frame
    else:
        limit = tl.zeros([BLOCK_Q], tl.int32) + frames * per_frame
    limit = tl.where(inside, limit, 0)
    # The tile reads as far as its last query sees; splits after that have no key at all.
    begin = split * split_keys
    end = tl.minimum(tl.max(limit, axis=0), begin + split_keys)

    stride_qb, stride_qh, stride_qi = aligned(stride_qb, stride_qh, stride_qi, ALIGN)
    stride_kb, stride_kh, stride_kn = aligned(stride_kb, stride_kh, stride_kn, ALIGN)
    stride_vb, stride_vh, stride_vn = aligned(stride_vb, stride_vh, stride_vn, ALIGN)
    d = tl.arange(0, BLOCK_D)
    q += sample.to(tl.int64) * stride_qb + head.to(tl.int64) * stride_qh
    k += sample.to(tl.int64) * stride_kb + head.to(tl.int64) * stride_kh
    v += sample.to(tl.int64) * stride_vb + head.to(tl.int64) * stride_vh
    q_tile = tl.load(
        q + query.to(tl.int64)[:, None] * stride_qi + d[None, :],
        mask=inside[:, None] & (d < DIM)[None, :],
        other=0.0,
    )
    # Running maximum (in units of log2), sum and weighted values of every query: online softmax.
    top = tl.full([BLOCK_Q], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    result = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    for first in range(begin, end, BLOCK_N):
        key = first + tl.arange(0, BLOCK_N)
        mask = (key < end)[:, None] & (d < DIM)[None, :]
        at = key.to(tl.int64)[:, None]
        k_tile = tl.load(k + at * stride_kn + d[None, :], mask=mask, other=0.0)
        zeros = tl.zeros([BLOCK_Q, BLOCK_N], tl.float32)
        logits = dot(q_tile, tl.trans(k_tile), zeros) * (scale * LOG2E)
        seen = key[None, :] < tl.minimum(limit, end)[:, None]
        logits = tl.where(seen, logits, -float("inf"))
        new_top = tl.maximum(top, tl.max(logits, axis=1))
        # A query that has seen no key yet: 0 instead of -inf, as -inf - -inf would be NaN.
        shift = tl.where(new_top == -float("inf"), 0.0, new_top)
        share = tl.exp2(logits - shift[:, None])
        old = tl.exp2(top - shift)
        total = total * old + tl.sum(share, axis=1)
        # The result so far refers to the old maximum, as the sum does. The product takes
        # probabilities in the dtype of the values (tensor cores), and adds in fp32.
        v_tile = tl.load(v + at * stride_vn + d[None, :], mask=mask, other=0.0)
        result = dot(share.to(v_tile.dtype), v_tile, result * old[:, None])
        top = new_top
    # Splits after the last visible key: 0, with the log-sum-exp -inf, which weighs nothing.
    result = tl.where(
        (total != 0.0)[:, None], result / tl.where(total != 0.0, total, 1.0)[:, None], 0.0
    )
    row = (sample.to(tl.int64) * heads + head) * queries + query
    # `out` is (splits, B, H, Q, D) in fp32, or the result itself for one split.
    row += split.to(tl.int64) * tl.num_programs(1) * queries
    tl.store(
        out + row[:, None] * DIM + d[None, :],
        result.to(out.dtype.element_ty),
        mask=inside[:, None] & (d < DIM)[None, :],
    )
    tl.store(lse + row, log_sum(top / LOG2E, total), mask=inside)


@triton.jit
def combine_kernel(
    partial, lse, out, rows,
    SPLITS: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Join the splits of every query, weighted by their share of the softmax."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, BLOCK_D)
    inside = row < rows
    mask = inside[:, None] & (d < DIM)[None, :]
    top = tl.full([BLOCK], -float("inf"), tl.float32)
    at = row
    for _ in range(SPLITS):
        top = tl.maximum(top, tl.load(lse + at, mask=inside, other=0.0))
        at += rows
    # Two splits with LSE 2 and 1: weights 1 and e^-1, hence shares .73 and .27 of their results.
    top = tl.where(top == -float("inf"), 0.0, top)
    total = tl.zeros([BLOCK], tl.float32)
    result = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    at = row
    for _ in range(SPLITS):
        weight = tl.exp2((tl.load(lse + at, mask=inside, other=0.0) - top) * LOG2E)
        value = tl.load(partial + at[:, None] * DIM + d[None, :], mask=mask, other=0.0)
        result += value * weight[:, None]
        total += weight
        at += rows
    result = tl.where(
        (total != 0.0)[:, None], result / tl.where(total != 0.0, total, 1.0)[:, None], 0.0
    )
    tl.store(out + row[:, None] * DIM + d[None, :], result.to(out.dtype.element_ty), mask=mask)


def ccam_attention(
    q: Tensor, k: Tensor, v: Tensor, frames: int, per_frame: int, causal: bool, scale: float
) -> Tensor:
    """See :func:`tokencomp.kernels.ccam_attention.naive`."""
    checks.triton_heads(q, MAX_HEAD_DIM)
    q, k, v = checks.rows_contiguous(q), checks.rows_contiguous(k), checks.rows_contiguous(v)
    batch, heads, queries, dim = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if out.numel() == 0:
        return out
    block_q, block_n, warps, stages = blocks(queries, dim, q.element_size())
    tiles = triton.cdiv(queries, block_q)
    key_blocks = triton.cdiv(k.shape[2], block_n)
    splits = split_count(tiles * batch * heads, key_blocks, q.device)
    split_keys = triton.cdiv(key_blocks, splits) * block_n
    rows = batch * heads * queries
    partial = out if splits == 1 else out.new_empty(splits, *q.shape, dtype=torch.float32)
    lse = torch.empty(splits, rows, dtype=torch.float32, device=q.device)
    ccam_kernel[(tiles, batch * heads, splits)](
        q, k, v, frames, partial, lse, scale,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        queries, per_frame, heads, split_keys,
        CAUSAL=causal, DIM=dim, BLOCK_D=padded(dim), BLOCK_Q=block_q, BLOCK_N=block_n,
        ALIGN=alignment(q, k, v), num_warps=warps, num_stages=stages,
    )  # fmt: skip
    if splits > 1:
        combine_kernel[(triton.cdiv(rows, 16),)](
            partial, lse, out, rows,
            SPLITS=splits, DIM=dim, BLOCK_D=padded(dim), BLOCK=16, num_warps=4,
        )  # fmt: skip
    return out


def blocks(queries: int, dim: int, itemsize: int) -> tuple[int, int, int, int]:
    """Return (queries, keys, warps, stages) of a tile.

    Tiles in fp32 and tiles of large heads are smaller, because queries, keys, values and the
    running result share the registers.
    """
    if itemsize == 4:
        return (16, 32, 8, 1) if dim > 64 else (16, 16, 4, 1)
    if queries <= 64:
        return 16 if queries <= 16 else 64, 64, 4, 2
    return 128, 64, 8 if dim > 64 else 4, 3 if dim <= 64 else 2


def split_count(programs: int, blocks: int, device: torch.device) -> int:
    """Return the number of key splits.

    There are about four programs per multiprocessor, and each split has at least eight key blocks.
    """
    target = triton.cdiv(4 * multiprocessors(device), programs)
    return max(1, min(target, 32, blocks // 8))
