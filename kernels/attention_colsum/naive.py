"""Plain PyTorch version of ``attention_colsum``.

They walk over blocks of probe rows, so that a rows × keys matrix exists for one block at a time.
The shapes are: `q` ``(B, Hq, R, D)``, `k` ``(B, Hkv, N, D)``, `weights` and `lse` ``(B, Hq, R)``
in fp32, `lo` and `hi` ``(B, R)`` in int32. They compute in fp32 (fp64 for fp64 inputs).
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

# Rows of a block, and the most logits that it may have (16 MiB in fp32). On a CPU, blocks of this
# height stay in the cache between their passes and compute few logits that causality hides.
BLOCK_ROWS = 64
BLOCK_ELEMENTS = 1 << 22


def attention_colsum(
    q: Tensor, k: Tensor, weights: Tensor, visible: Tensor, scale: float, iterations: int
) -> Tensor:
    """Apply s ← sM `iterations` times to the weights s; `visible` is int32 ``(3, B, R)``."""
    lo, hi, key = visible.unbind()
    if iterations > 1 and is_triangular(hi, key):
        return causal_powers(q, k, weights, lo, hi, scale, iterations)
    return repeated(column_sums, attention_lse, q, k, weights, visible, scale, iterations)


def repeated(
    sums: Callable[..., Tensor],
    lse_of: Callable[..., Tensor],
    q: Tensor,
    k: Tensor,
    weights: Tensor,
    visible: Tensor,
    scale: float,
    iterations: int,
) -> Tensor:
    """As :func:`attention_colsum`, with one pass of `sums` per application and one of `lse_of`."""
    lo, hi, key = visible.unbind()
    lse = lse_of(q, k, lo, hi, scale) if iterations > 1 else None
    out = sums(q, k, weights, lo, hi, lse, scale)
    for _ in range(iterations - 1):
        at = key.clamp(min=0).long()[:, None].expand_as(weights)
        weights = out.gather(2, at).masked_fill_(key[:, None] < 0, 0.0)
        out = sums(q, k, weights, lo, hi, lse, scale)
    return out


def column_sums(
    q: Tensor, k: Tensor, weights: Tensor, lo: Tensor, hi: Tensor, lse: Tensor | None, scale: float
) -> Tensor:
    """Compute the column sums of every query head, ``(B, Hq, N)``."""
    out = weights.new_zeros(*q.shape[:2], k.shape[2])
    for rows, columns, logits in _blocks(q, k, lo, hi, scale):
        norm = logits.logsumexp(-1) if lse is None else lse[:, :, rows].to(logits.dtype)
        # A row without a visible key has lse -inf, and exp(-inf + inf) would be NaN. With +inf its
        # probabilities exp(-inf - inf) are 0. A NaN stays and reaches the result.
        norm = torch.where(norm.isinf(), torch.inf, norm)
        probabilities = logits.sub_(norm[..., None]).exp_()
        weighted = weights[:, :, None, rows].to(logits.dtype) @ probabilities
        out[:, :, columns] += weighted.squeeze(2)
    return out


def attention_lse(q: Tensor, k: Tensor, lo: Tensor, hi: Tensor, scale: float) -> Tensor:
    """Compute the log-sum-exp of every row's visible logits, ``(B, Hq, R)``.

    The value is -inf where a row sees no key.
    """
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = torch.full(q.shape[:3], -torch.inf, dtype=dtype, device=q.device)
    for rows, _, logits in _blocks(q, k, lo, hi, scale):
        out[:, :, rows] = logits.logsumexp(-1)
    return out


def is_triangular(hi: Tensor, key: Tensor) -> bool:
    """Whether row i belongs to key i and sees no later key, as :func:`causal_powers` requires."""
    index = torch.arange(hi.shape[1], device=hi.device, dtype=hi.dtype)
    return bool(((key == index) | (key < 0)).all()) and bool((hi <= index + 1).all())


def causal_powers(
    q: Tensor, k: Tensor, weights: Tensor, lo: Tensor, hi: Tensor, scale: float, steps: int
) -> Tensor:
    """Apply s ← sM `steps` times in one sweep over a lower triangular M; result ``(B, Hq, N)``.

    Entry j of the next s depends only on rows i ≥ j. A walk from the last block of rows to the
    first therefore knows every power of s within a block before it adds any of them to earlier
    columns, and computes M once instead of once per step. This algorithm is ours.
    """
    powers = weights.new_zeros(steps + 1, *q.shape[:2], k.shape[2])
    powers[0] = weights
    for rows, columns, logits in _blocks(q, k, lo, hi, scale, backwards=True):
        matrix = torch.softmax(logits, -1, out=logits)
        empty = (hi <= lo)[:, rows]
        if bool(empty.any()):
            matrix.masked_fill_(empty[:, None, :, None], 0.0)
        # Columns from `first` on belong to this block of rows, earlier ones to blocks that follow
        # in the walk. Columns of the block need the powers in order, as each step reads the last;
        # the earlier columns take all steps in one product.
        first = max(rows.start - columns.start, 0)
        own = slice(columns.start + first, columns.stop)
        for step in range(steps):
            spread = powers[step][:, :, None, rows] @ matrix[..., first:]
            powers[step + 1][:, :, own] += spread.squeeze(2)
        if first:
            earlier = powers[:-1, :, :, rows].permute(1, 2, 0, 3) @ matrix[..., :first]
            powers[1:, :, :, columns.start : own.start] += earlier.permute(2, 0, 1, 3)
    return powers[-1]


def _blocks(
    q: Tensor, k: Tensor, lo: Tensor, hi: Tensor, scale: float, backwards: bool = False
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yield row slice, column slice and masked logits ``(B, Hq, rows, columns)`` of all blocks.

    The column slice covers the keys that any row of the block sees. Blocks in which no row sees a
    key are left out. All blocks have their logits in the same memory, one after the other: fresh
    memory for each would take a CPU about as long as the product that fills it.
    """
    batch, heads, total, dim = q.shape
    kv_heads, keys = k.shape[1:3]
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    k = k.to(dtype)
    size = min(BLOCK_ROWS, max(1, BLOCK_ELEMENTS // max(1, batch * heads * keys)))
    memory = torch.empty(batch * heads * size * keys, dtype=dtype, device=q.device)
    starts = range(0, total, size)
    for first in reversed(starts) if backwards else starts:
        rows = slice(first, min(first + size, total))
        low, high = lo[:, rows], hi[:, rows]
        seen = high > low
        if not bool(seen.any()):
            continue
        begin, end = int(low[seen].min()), int(high[seen].max())
        block = q[:, :, rows].to(dtype) * scale
        block = block.reshape(batch, kv_heads, -1, dim)
        shape = (batch, kv_heads, block.shape[2], end - begin)
        logits = memory[: math.prod(shape)].view(shape)
        torch.matmul(block, k[:, :, begin:end].transpose(-1, -2), out=logits)
        logits = logits.view(batch, heads, -1, end - begin)
        # If all rows begin at the same key, every row sees the columns before `shared`, and only
        # the columns from there on need a mask.
        shared = begin if int(low.max()) > begin else min(max(int(high.min()), begin), end)
        if shared < end:
            column = torch.arange(shared, end, device=q.device)
            hidden = (column < low[..., None]) | (column >= high[..., None])
            logits[..., shared - begin :].masked_fill_(hidden[:, None], -torch.inf)
        yield rows, slice(begin, end), logits
