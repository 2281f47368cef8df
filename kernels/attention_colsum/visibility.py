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


def dense_rows(q: Tensor, k: Tensor, causal: bool) -> Rows:
    """Return the rows of a batch with `q` ``(B, Hq, R, D)`` and `k` ``(B, Hkv, N, D)``.

    They belong to the last R keys. Without a causal mask they see all keys.

    Raises
    ------
    KernelError
        If there are more causal rows than keys.
    """
    batch, rows, keys = q.shape[0], q.shape[2], k.shape[2]
    if causal and rows > keys:
        raise KernelError(f"{rows} probe rows but {keys} keys: pass visible to place the rows")
    key = torch.arange(rows, device=q.device, dtype=torch.int32) + max(0, keys - rows)
    key = key.expand(batch, rows).contiguous()
    hi = key + 1 if causal else torch.full_like(key, keys)
    return Rows(torch.zeros_like(key), hi, key)


def packed_rows(q: Tensor, k: Tensor, cu_q: Tensor, cu_k: Tensor, causal: bool) -> Rows:
    """Return the rows of packed sequences with `q` ``(Tq, Hq, D)`` and `k` ``(Tk, Hkv, D)``.

    The batch size is 1. The rows of a sequence belong to its last keys.

    Raises
    ------
    KernelError
        If the offsets do not rise from 0 to the number of tokens, or the two offset tensors differ
        in length.
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
    key = end - (cu_q[sequence + 1] - token)
    hi = end
    if causal:  # a sequence may have more rows than keys; the first of them see none
        hi, key = (key + 1).masked_fill(key < lo, 0), key.masked_fill(key < lo, -1)
    return Rows(lo[None].contiguous(), hi[None].contiguous(), key[None].contiguous())
