"""Which keys a probe row sees, as one half-open range ``[lo, hi)`` of key columns per row.

Causal masks at any offset, left padding, cached prefixes and packed (varlen) batches all become
the same thing, so one kernel serves them all.
"""

from typing import NamedTuple

import torch
from tokencomp.kernels import checks
from tokencomp.kernels.errors import KernelError
from torch import Tensor


class Rows(NamedTuple):
    """Probe rows: ``lo``, ``hi`` and ``key`` are int32 ``(B, R)``.

    Row r of sample b sees the keys ``lo <= j < hi``; ``key`` is the column of the row's own token,
    -1 where the row is padding (it then sees nothing).
    """

    lo: Tensor
    hi: Tensor
    key: Tensor


def dense_rows(
    q: Tensor,
    k: Tensor,
    q_index: Tensor | None,
    kv_start: Tensor | None,
    kv_end: Tensor | None,
    causal: bool,
) -> Rows:
    """Rows of a padded batch: `q` is ``(B, Hq, R, D)``, `k` is ``(B, Hkv, N, D)``."""
    batch, rows, keys = q.shape[0], q.shape[2], k.shape[2]
    start = _per_sample("kv_start", kv_start, batch, 0, q)
    end = _per_sample("kv_end", kv_end, batch, keys, q)
    if q_index is None:
        index = _default_index(rows, keys, start, end, causal, q.device)
    else:
        checks.integer("q_index", q_index)
        checks.same_device(q=q, q_index=q_index)
        if q_index.dim() == 1:
            q_index = q_index[None].expand(batch, -1)
        if q_index.shape != (batch, rows):
            raise KernelError(
                f"q_index must be ({rows},) or ({batch}, {rows}); got {tuple(q_index.shape)}"
            )
        index = q_index.to(torch.int32)
    index = index.expand(batch, rows)
    padding = index < 0
    hi = torch.minimum(index + 1, end) if causal else end.expand(batch, rows)
    hi = hi.clamp(0, keys).masked_fill(padding, 0)
    lo = start.clamp(0, keys).expand(batch, rows)
    return Rows(lo.contiguous(), hi.contiguous(), index.contiguous())


def packed_rows(
    q: Tensor, k: Tensor, q_index: Tensor | None, cu_q: Tensor, cu_k: Tensor, causal: bool
) -> Rows:
    """Rows of packed sequences: `q` is ``(Tq, Hq, D)``, `k` is ``(Tk, Hkv, D)``; batch is 1.

    `q_index` counts within each row's own sequence.
    """
    for name, cu, total in (("cu_seqlens_q", cu_q, len(q)), ("cu_seqlens_k", cu_k, len(k))):
        checks.integer(name, cu)
        checks.shape(name, cu, 1, "(sequences + 1,)")
        ordered = (cu[0] == 0) & (cu[-1] == total) & (cu.diff() >= 0).all()
        checks.holds(ordered, f"{name} must rise from 0 to {total}; got {cu.tolist()[:9]}")
    checks.same_device(q=q, k=k, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k)
    if len(cu_q) != len(cu_k):
        raise KernelError(f"cu_seqlens_q has {len(cu_q)} entries, cu_seqlens_k {len(cu_k)}")
    cu_q, cu_k = cu_q.to(torch.int32), cu_k.to(torch.int32)
    token = torch.arange(len(q), device=q.device, dtype=torch.int32)
    sequence = (torch.searchsorted(cu_q, token, right=True) - 1).clamp(min=0)
    lo, end = cu_k[sequence], cu_k[sequence + 1]
    if q_index is None:
        key = end - (cu_q[sequence + 1] - token)
        padding = key < lo
    else:
        checks.integer("q_index", q_index)
        if q_index.shape != token.shape:
            raise KernelError(f"q_index must be ({len(q)},); got {tuple(q_index.shape)}")
        key = q_index.to(torch.int32) + lo
        padding = q_index < 0
    if not causal and q_index is None:
        padding = torch.zeros_like(padding)
    hi = torch.minimum(key + 1, end) if causal else end
    hi = hi.masked_fill(padding, 0)
    key = key.masked_fill(padding, -1)
    return Rows(lo[None].contiguous(), hi[None].contiguous(), key[None].contiguous())


def _default_index(
    rows: int, keys: int, start: Tensor, end: Tensor, causal: bool, device: torch.device
) -> Tensor:
    """Column of every row, ``(B, R)``: row i is key i if there are as many, else the last ones."""
    index = torch.arange(rows, device=device, dtype=torch.int32)[None]
    if rows != keys:
        if causal and rows > keys:
            raise KernelError(f"{rows} probe rows but {keys} keys: give q_index to place the rows")
        if not causal:
            return index  # the column plays no role
        index = end - rows + index
    return torch.where((index >= start) & (index < end), index, -1)


def _per_sample(name: str, value: Tensor | None, batch: int, default: int, q: Tensor) -> Tensor:
    """A per-sample bound as int32 ``(B, 1)``."""
    if value is None:
        return torch.full((batch, 1), default, dtype=torch.int32, device=q.device)
    checks.integer(name, value)
    checks.same_device(q=q, **{name: value})
    if value.shape != (batch,):
        raise KernelError(f"{name} must be ({batch},); got {tuple(value.shape)}")
    return value.to(torch.int32)[:, None]
