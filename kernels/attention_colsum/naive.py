"""Plain PyTorch versions of ``attention_colsum`` and ``attention_lse``.

They walk over blocks of probe rows, so no rows × keys matrix beyond one block ever exists.
Shapes: `q` ``(B, Hq, R, D)``, `k` ``(B, Hkv, N, D)``, `weights` and `lse` ``(B, Hq, R)`` fp32,
`lo` and `hi` int32 ``(B, R)``; computed in fp32 (fp64 for fp64 inputs).
"""

from collections.abc import Iterator

import torch
from torch import Tensor

# Logits per block: 16 MiB in fp32, small enough to stay in the last-level cache of a CPU.
BLOCK_ELEMENTS = 1 << 22


def attention_colsum(
    q: Tensor, k: Tensor, weights: Tensor, lo: Tensor, hi: Tensor, lse: Tensor | None, scale: float
) -> Tensor:
    """Column sums per head, ``(B, Hq, N)``."""
    out = _accumulator(q, k.shape[2])
    for rows, columns, logits in _blocks(q, k, lo, hi, scale):
        norm = logits.logsumexp(-1) if lse is None else lse[:, :, rows].to(logits.dtype)
        # +inf where a row sees no key: exp(-inf - inf) is 0, never NaN.
        norm = torch.where(norm.isfinite(), norm, torch.inf)
        probabilities = logits.sub_(norm[..., None]).exp_()
        weighted = weights[:, :, None, rows].to(logits.dtype) @ probabilities
        out[:, :, columns] += weighted.squeeze(2)
    return out


def attention_lse(q: Tensor, k: Tensor, lo: Tensor, hi: Tensor, scale: float) -> Tensor:
    """Log-sum-exp of every row's visible logits, ``(B, Hq, R)``; -inf where none is visible."""
    out = _accumulator(q, q.shape[2]).fill_(-torch.inf)
    for rows, _, logits in _blocks(q, k, lo, hi, scale):
        out[:, :, rows] = logits.logsumexp(-1)
    return out


def _blocks(
    q: Tensor, k: Tensor, lo: Tensor, hi: Tensor, scale: float
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yield (rows, columns, masked logits ``(B, Hq, rows, columns)``) over all row blocks."""
    batch, heads, total, dim = q.shape
    kv_heads, keys = k.shape[1:3]
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    k = k.to(dtype)
    size = max(1, BLOCK_ELEMENTS // max(1, batch * heads * keys))
    for first in range(0, total, size):
        rows = slice(first, min(first + size, total))
        low, high = lo[:, rows], hi[:, rows]
        seen = high > low
        if not bool(seen.any()):
            continue
        begin, end = int(low[seen].min()), int(high[seen].max())
        block = q[:, :, rows].to(dtype) * scale
        block = block.reshape(batch, kv_heads, -1, dim)
        logits = block @ k[:, :, begin:end].transpose(-1, -2)
        logits = logits.view(batch, heads, -1, end - begin)
        if int(low.max()) > begin or int(high.min()) < end:
            column = torch.arange(begin, end, device=q.device)
            hidden = (column < low[..., None]) | (column >= high[..., None])
            logits.masked_fill_(hidden[:, None], -torch.inf)
        yield rows, slice(begin, end), logits


def _accumulator(q: Tensor, last: int) -> Tensor:
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return torch.zeros(*q.shape[:2], last, dtype=dtype, device=q.device)
