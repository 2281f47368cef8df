"""Keys and attention of blocks of a vision tower, recomputed from the input of their attention."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from tokencomp.adapters.base import Adapter
from tokencomp.engine.scores.parallel import gather_heads
from tokencomp.errors import OptionError
from tokencomp.tokens.signals import TowerSignal
from tokencomp.torchlib import compat


def attention_blocks(tower: nn.Module) -> list[nn.Module]:
    """Self-attention modules of a tower, in order.

    They are recognised by their projections: one fused `qkv`, or a `q_proj` and a `k_proj`.
    """
    return [
        m
        for m in tower.modules()
        if hasattr(m, "qkv") or (hasattr(m, "q_proj") and hasattr(m, "k_proj"))
    ]


def watched_blocks(
    adapter: Adapter, signals: Collection[TowerSignal]
) -> list[tuple[nn.Module, list[TowerSignal]]]:
    """Attention modules that `signals` are read from, in order, and which from each."""
    blocks = attention_blocks(adapter.tower)
    blocks = blocks[: adapter.used_blocks(len(blocks))]
    by_place: dict[int, list[TowerSignal]] = {}
    for signal in signals:
        place = signal.place(len(blocks))
        if place is None:
            raise OptionError(
                f"a reducer reads block {signal.block} of the vision tower, but {adapter.family} "
                f"uses the blocks 0 … {len(blocks) - 1}. Choose one of them, counted from the end "
                "if negative, or a fraction of the depth below 1."
            )
        by_place.setdefault(place, []).append(signal)
    return [(blocks[place], by_place[place]) for place in sorted(by_place)]


def queries_and_keys(attn: Any, arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """q and k of all heads before any rotation, shape (B, S, heads, head_dim)."""
    x = arguments["hidden_states"]
    x = x[None] if x.ndim == 2 else x
    if hasattr(attn, "qkv"):
        q, k, _ = attn.qkv(x).unflatten(-1, (3, attn.num_heads, -1)).unbind(-3)
        return q, k
    q, k = attn.q_proj(x), attn.k_proj(x)
    q, k = getattr(attn, "q_norm", nn.Identity())(q), getattr(attn, "k_norm", nn.Identity())(k)
    # A rank of a sharded tower has only some of the heads, and `num_heads` may count all of them.
    heads = (-1, attn.head_dim)
    q, k = q.unflatten(-1, heads), k.unflatten(-1, heads)
    return gather_heads(attn, q, dim=-2), gather_heads(attn, k, dim=-2)


def rotated(attn: Any, q: Tensor, k: Tensor, arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """q and k with the rotary embedding of the tower, if it has one."""
    tables = arguments.get("position_embeddings")
    return (q, k) if tables is None else compat.rotate_vision(attn, q, k, *tables)


def attention_received(
    q: Tensor, k: Tensor, cu_seqlens: Tensor | None, class_token: bool
) -> Tensor:
    """Attention that every patch receives, mean over heads, float32.

    From the class token where there is one (FasterVLM, arXiv 2412.01818), else the mean over all
    patches that may attend to it (VisionZip, arXiv 2412.04467). q and k (B, S, heads, head_dim)
    give (B, S), where B = 1 with `cu_seqlens`, the bounds of independent sequences.
    """
    from tokencomp.kernels import attention_colsum
    from tokencomp.kernels.dispatch import checked

    rows = 1 if class_token and cu_seqlens is None else q.shape[1]
    if cu_seqlens is None:
        visible, weights = None, torch.full((rows,), 1.0 / rows, device=q.device)
    else:
        ends = torch.stack([cu_seqlens[:-1], cu_seqlens[1:]])
        first, stop = ends.repeat_interleave(cu_seqlens.diff(), 1, output_size=rows)
        own = torch.arange(rows, device=q.device)
        visible = torch.stack([first, stop, own])[:, None].int()
        weights = 1.0 / (stop - first).float()
    q, k = q[:, :rows].transpose(1, 2), k.transpose(1, 2)
    with checked():  # bounds come from the tower
        sums: Tensor = attention_colsum(q, k, weights, visible=visible, causal=False)
    return sums
