"""Weights that are distributed over ranks: heads under tensor parallelism, shards under FSDP."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tokencomp.errors import UnsupportedModelError
from tokencomp.torchlib import compat


def total_heads(attn: Any) -> int:
    """Number of query heads of a self-attention module over all ranks."""
    config = getattr(attn, "config", None)
    config = compat.layer_config(config, getattr(attn, "layer_idx", 0))
    for source, name in (
        (config, "num_attention_heads"),
        (config, "num_heads"),
        (attn, "num_heads"),
    ):
        count = getattr(source, name, None)
        if isinstance(count, int):
            return count
    raise UnsupportedModelError(
        f"{type(attn).__name__} does not say how many heads it has (config.num_attention_heads), "
        "so its attention cannot be scored. Use a reducer without attention, such as 'divprune'."
    )


def gather_heads(attn: Any, x: Tensor, dim: int) -> Tensor:
    """Concatenate `x` over ranks along the head axis `dim`; unchanged if this rank has all heads.

    Under tensor parallelism every rank computes some of the heads, in order. All ranks must keep
    the same tokens, so scores need all heads. Values are gathered rather than summed, so that the
    mean over heads rounds as in a single process.
    """
    total, heads = total_heads(attn), x.shape[dim]
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


@contextlib.contextmanager
def unsharded(layer: nn.Module) -> Iterator[None]:
    """Gather the weights of `layer` under FSDP, so that its submodules can be called one by one.

    FSDP gathers weights when the layer itself is called. Under FSDP2 they then stay gathered for
    that call; FSDP1 frees them, and gathers them once more.
    """
    for module in layer.modules():
        unshard = getattr(module, "unshard", None)
        if unshard is not None:
            unshard()
    if any(hasattr(module, "_fsdp_wrapped_module") for module in layer.modules()):
        from torch.distributed.fsdp import FullyShardedDataParallel

        with FullyShardedDataParallel.summon_full_params(layer, writeback=False):
            yield
    else:
        yield


def unwrapped(module: Any) -> Any:
    """The module inside wrappers of FSDP1, activation checkpointing and torch.compile."""
    names = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod")
    while inner := [module._modules[name] for name in names if name in module._modules]:
        module = inner[0]
    return module
