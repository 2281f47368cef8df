"""Attention heads that are distributed over ranks by tensor parallelism."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokencomp.errors import UnsupportedModelError
from tokencomp.torchlib import compat


def gather_heads(attn: Any, x: Tensor, dim: int) -> Tensor:
    """Concatenate `x` over ranks along the head axis `dim`; unchanged if this rank has all heads.

    Under tensor parallelism every rank computes some of the heads, in order. All ranks must keep
    the same tokens, so scores need all heads. Values are gathered rather than summed, so that the
    mean over heads rounds as in a single process.
    """
    config = compat.layer_config(getattr(attn, "config", None), getattr(attn, "layer_idx", 0))
    fields = (config, "num_attention_heads"), (config, "num_heads"), (attn, "num_heads")
    counts = (getattr(source, name, None) for source, name in fields)
    total, heads = next((n for n in counts if isinstance(n, int)), None), x.shape[dim]
    if total is None:
        raise UnsupportedModelError(
            f"{type(attn).__name__} does not say how many heads it has "
            "(config.num_attention_heads), so its attention cannot be scored. Use a reducer "
            "without attention, such as 'divprune'."
        )
    if heads == total:
        return x
    group = tensor_parallel_group(attn)
    ranks = 1 if group is None else torch.distributed.get_world_size(group)
    if heads * ranks != total:
        raise UnsupportedModelError(
            f"{type(attn).__name__} computes {heads} of its {total} heads on this rank, and "
            f"{ranks} ranks are known to share them, so attention cannot be scored. Load the model "
            "with tp_plan and a number of ranks that divides the heads, or use 'divprune'."
        )
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(ranks)]
    torch.distributed.all_gather(parts, x.contiguous(), group=group)
    return torch.cat(parts, dim=dim)


def tensor_parallel_group(attn: Any) -> Any:
    """The process group that shares the heads of a self-attention module, or None.

    Found by the DTensor weight of the query projection (transformers 5.16 and newer) or by the
    device mesh that its module stores (older releases).
    """
    projections = (getattr(attn, name, None) for name in ("q_proj", "qkv_proj", "qkv"))
    # LoRA wraps the linear layer.
    for module in (m for outer in projections if outer is not None for m in outer.modules()):
        weight = getattr(module, "weight", None)
        mesh = getattr(weight, "device_mesh", None) or getattr(module, "_hf_device_mesh", None)
        if mesh is None:
            continue
        if mesh.ndim == 1:
            return mesh.get_group()
        if "tp" in (mesh.mesh_dim_names or ()):
            return mesh.get_group("tp")
    return None
