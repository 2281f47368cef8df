"""Benchmarks of kernels that compute attention."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernels.case import Case, Place, prepared
from tokencomp import kernels


@prepared
def colsum(
    at: Place,
    name: str,
    rows: int,
    keys: int,
    heads: int,
    kv_heads: int,
    dim: int,
    iterations: int = 1,
) -> Case:
    """Attention column sums; ``rows=0``: one row per key."""
    n = max(64, int(keys * at.scale))
    r = rows or n
    q = at.values(1, heads, r, dim)
    k = at.values(1, kv_heads, n, dim)
    causal = r == n
    pairs = r * n * (0.5 if causal else 1.0)

    def eager(q: Tensor, k: Tensor) -> Tensor:
        k = k.repeat_interleave(heads // kv_heads, dim=1)
        logits = (q @ k.transpose(-1, -2)).float() * dim**-0.5
        if causal:
            mask = torch.ones(r, n, dtype=torch.bool, device=q.device).tril()
            logits = logits.masked_fill(~mask, -torch.inf)
        matrix = logits.softmax(-1)
        weights = matrix.new_ones(1, heads, 1, r)
        for _ in range(iterations):
            weights = weights @ matrix
        return weights[:, :, 0].mean(1)

    item = q.element_size()
    passes = 1 + iterations
    return Case(
        op="attention_colsum",
        name=name,
        call=lambda: kernels.attention_colsum(q, k, causal=causal, iterations=iterations),
        eager=eager,
        arguments=(q, k),
        flops=2 * passes * heads * pairs * dim,
        bytes=passes * (kv_heads * n + heads * r) * dim * item + 4 * heads * n,
        tensor_cores=at.dtype != torch.float32,
        others=_colreduce(q, k, causal) if iterations == 1 else {},
    )


@prepared
def ccam(
    at: Place, name: str, queries: int, frames: int, tokens: int, heads: int, dim: int
) -> Case:
    """Causal cross-attention to frames."""
    f = max(2, int(frames * at.scale))
    n = f * tokens
    q = at.values(1, heads, queries, dim)
    k, v = (at.values(1, heads, n, dim) for _ in range(2))

    def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen = torch.arange(queries, device=q.device) * f // queries + 1
        mask = torch.arange(n, device=q.device) < (seen * tokens)[:, None]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    visible = sum(kernels.visible_frames(i, queries, f) for i in range(queries)) * tokens
    return Case(
        op="ccam_attention",
        name=name,
        call=lambda: kernels.ccam_attention(q, k, v, f),
        eager=eager,
        arguments=(q, k, v),
        flops=4 * heads * visible * dim,
        bytes=2 * heads * (queries + n) * dim * q.element_size(),
        tensor_cores=at.dtype != torch.float32,
    )


def _colreduce(q: Tensor, k: Tensor, causal: bool) -> dict[str, Callable[[], Any]]:
    """The public two-pass kernel, where it is installed."""
    try:
        from flash_colreduce import flash_colreduce
    except ImportError:
        return {}
    group = q.shape[1] // k.shape[1]
    wide = k.repeat_interleave(group, dim=1) if group > 1 else k

    def call() -> Tensor:
        return flash_colreduce(q, wide, reduction="sum", is_causal=causal).mean(1)

    return {"flash-colreduce": call}
