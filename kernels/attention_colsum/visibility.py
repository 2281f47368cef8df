"""The keys that a probe row sees, as one half-open range ``[lo, hi)`` of key columns per row.

Causal masks at any offset, left padding, cached prefixes and packed (varlen) batches all reduce to
such ranges, so one kernel serves all of them.
"""

from typing import NamedTuple

import torch
from tokencomp.kernels import checks
from tokencomp.kernels.errors import KernelError
from torch import Tensor


class Rows(NamedTuple):
    """Visible ranges of the probe rows: ``lo``, ``hi`` and ``key`` are int32 ``(B, R)``.

    Row r of sample b sees the keys ``lo <= j < hi``. ``key`` is the column of the row's own token,
    or -1 where the row is padding and sees no key.
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
    """Return the rows of a padded batch with `q` ``(B, Hq, R, D)`` and `k` ``(B, Hkv, N, D)``.

    Raises
    ------
    KernelError
        If `q_index`, `kv_start` or `kv_end` has a wrong shape, dtype or device, or if there are
        more causal rows than keys and no `q_index`.
    """
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
    """Return the rows of packed sequences with `q` ``(Tq, Hq, D)`` and `k` ``(Tk, Hkv, D)``.

    The batch size is 1. `q_index` counts within each row's own sequence.

    Raises
    ------
    KernelError
        If the offsets do not rise from 0 to the number of tokens, the two offset tensors differ in
        length, or `q_index` has a wrong shape or dtype.
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
    """Return the key column of every row, ``(B, R)``.

    Row i belongs to key i if rows and keys are equal in number; otherwise the rows are the last
    ones before `end`.
    """
    index = torch.arange(rows, device=device, dtype=torch.int32)[None]
    if rows != keys:
        if causal and rows > keys:
            raise KernelError(f"{rows} probe rows but {keys} keys: give q_index to place the rows")
        if not causal:
            return index  # without a causal mask the column plays no role
        index = end - rows + index
    return torch.where((index >= start) & (index < end), index, -1)


def _per_sample(name: str, value: Tensor | None, batch: int, default: int, q: Tensor) -> Tensor:
    """Return a bound per sample as int32 ``(B, 1)``, `default` if it is None."""
    if value is None:
        return torch.full((batch, 1), default, dtype=torch.int32, device=q.device)
    checks.integer(name, value)
    checks.same_device(q=q, **{name: value})
    if value.shape != (batch,):
        raise KernelError(f"{name} must be ({batch},); got {tuple(value.shape)}")
    return value.to(torch.int32)[:, None]
