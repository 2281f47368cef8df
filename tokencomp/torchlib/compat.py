"""Every difference between transformers releases from 5.6 on, by feature detection."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from tokencomp.errors import UnsupportedModelError

# Releases of the exactness suite, and the model types that it runs there (None: all). A test
# compares this table with that of `.ci/run`.
_QUICK = ("qwen2_vl", "qwen3_vl", "llava_onevision")
RELEASES: dict[str, tuple[str, ...] | None] = {
    "5.6.0": _QUICK,
    "5.13.1": _QUICK,
    "5.24.0": _QUICK,
    "5.25.0": None,
}
F = TypeVar("F", bound=Callable[..., Any])
CACHE_NAMES = ("cache", "past_key_values", "past_key_value")


def not_compiled(function: F) -> F:
    """`torch.compiler.disable` with types: a graph of Dynamo breaks before and after `function`."""
    disabled: F = torch.compiler.disable(function)
    return disabled


def tested_with(model_type: str) -> list[str]:
    """Transformers releases on which the exactness suite runs a model type, oldest first."""
    return [r for r, types in RELEASES.items() if types is None or model_type in types]


def get_cache(kwargs: Mapping[str, Any], out: Any = None) -> Any:
    """The KV cache of a call, from its arguments or (where the callee created it) its output."""
    for name in CACHE_NAMES:
        if kwargs.get(name) is not None:
            return kwargs[name]
    for name in CACHE_NAMES:
        cache = getattr(out, name, None)
        if cache is not None:
            return cache
    if isinstance(out, tuple) and len(out) > 1 and hasattr(out[1], "layers"):
        return out[1]
    return None


def bind(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a `module(...)` call by name."""
    if not args:
        return kwargs
    names = [p for p in inspect.signature(module.forward).parameters if p not in ("args", "kwargs")]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def layer_configs(config: Any) -> list[Any]:
    """The config of every decoder layer; in some releases they differ."""
    count = config.num_hidden_layers
    return list(getattr(config, "per_layer_config", None) or [config] * count)[:count]


def layer_config(config: Any, layer: int) -> Any:
    """The config of one decoder layer. Where layers differ, the config of the model lacks their
    sizes.
    """
    own = getattr(config, "per_layer_config", None)
    return own[layer] if own else config


def layer_values(config: Any, name: str) -> list[Any]:
    """Values of a field of a text config over the decoder layers; one value if all layers agree."""
    try:
        return [getattr(config, name, None)]
    except RuntimeError:  # transformers': the layers differ
        return [getattr(layer, name, None) for layer in layer_configs(config)]


def kv_sharing_modes(config: Any) -> list[str | None]:
    """For every layer: "store" if later layers reuse its keys, "reuse" if it reuses keys, else
    None.

    Empty if no layer shares keys. In releases whose config lacks this list, the last
    `num_kv_shared_layers` layers reuse the keys of the last earlier layer of their type.
    """
    modes: list[str | None] | None = getattr(config, "kv_sharing_modes", None)
    shared = getattr(config, "num_kv_shared_layers", None) or 0
    kinds = list(getattr(config, "layer_types", None) or ())
    if modes is not None or not shared or not kinds:
        return list(modes or ())
    first = len(kinds) - shared
    modes = [None] * first + ["reuse"] * shared
    for kind in set(kinds[first:]) & set(kinds[:first]):
        modes[first - 1 - kinds[:first][::-1].index(kind)] = "store"
    return modes


def recomputed(layer: nn.Module) -> bool:
    """Whether a backward pass would run this decoder layer again (gradient checkpointing)."""
    checkpointed = getattr(layer, "gradient_checkpointing", False) and layer.training
    return bool(checkpointed) and torch.is_grad_enabled()


def recomputes_hooks() -> bool:
    """Whether recomputation runs hooks as well: true if `__call__` is checkpointed, not
    `forward`.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    return "__call__" in vars(GradientCheckpointingLayer)


@functools.cache  # once per process, and not at import: transformers' models take long to load
def register_attention(name: str, function: Callable[..., Any]) -> None:
    """Register `function` as the attention backend `name`."""
    from transformers.modeling_utils import AttentionInterface

    AttentionInterface.register(name, function)


def file_with(owner: type, name: str) -> Any:
    """The module of a class or of its nearest base class that defines `name`; or None.

    Classes derived by a user or by FSDP2 are defined elsewhere than the functions that they call.
    """
    for base in owner.__mro__:
        code = sys.modules.get(base.__module__)
        if hasattr(code, name):
            return code
    return None


def attention_function(module: nn.Module, config: Any) -> Callable[..., Any]:
    """The function that the attention `module` calls for the backend that `config` names."""
    name = attention_implementation(config)
    wanted = "eager_attention_forward" if name == "eager" else "ALL_ATTENTION_FUNCTIONS"
    code: Any = sys.modules[type(module).__module__]
    if not hasattr(code, wanted):
        code = file_with(type(module), wanted)
    if code is None:
        raise UnsupportedModelError(
            f"merge=True: the module of {type(module).__name__} has no {wanted}, so the weights "
            "of merged tokens cannot reach its attention. Use merge=False."
        )
    found = getattr(code, wanted)
    function: Callable[..., Any] = found if name == "eager" else found[name]
    return function


def attention_implementation(config: Any) -> str:
    """Name of the attention backend ("sdpa", "eager", "flash_attention_2", ...)."""
    return str(getattr(config, "_attn_implementation", None) or "sdpa")


def copies_grouped_keys(config: Any) -> bool:
    """Whether SDPA copies the keys of a text config for all queries of a group if it gets a mask.

    Newer releases attend to grouped keys as they are for a single query (`pack_gqa`).
    """
    from transformers.integrations import sdpa_attention

    heads = layer_values(config, "num_attention_heads")
    kv_heads = layer_values(config, "num_key_value_heads")
    return not hasattr(sdpa_attention, "pack_gqa") and heads != kv_heads


def rotate_vision(
    attn: nn.Module, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    """Apply the rotary embedding of a vision tower to q and k, shape (B, S, H, D)."""
    code = file_with(type(attn), "apply_rotary_pos_emb_vision")
    q, k = code.apply_rotary_pos_emb_vision(q, k, cos, sin)
    return q, k


def window_order(tower: Any, grids: Tensor) -> Tensor:
    """Raster numbers of merged patches in the order in which a tower with window attention has
    them.
    """
    if hasattr(tower, "get_window_index"):  # before transformers 5.17
        return torch.as_tensor(tower.get_window_index(grids)[0])
    from transformers.vision_utils import get_vision_window_index

    sizes = {n: getattr(tower, n) for n in ("spatial_merge_size", "window_size", "patch_size")}
    return get_vision_window_index(grids, **sizes)[0]


def rope_index(body: Any, ids: Tensor, modalities: Tensor, **grids: Tensor) -> Tensor:
    """M-RoPE positions (3, B, L) by the model's own `get_rope_index`.

    `ids` are token ids, `modalities` 0 text, 1 image, 2 video (an argument of most models), (B, L).
    """
    get_rope_index: Callable[..., tuple[Tensor, Tensor]] = body.get_rope_index
    if "mm_token_type_ids" in inspect.signature(get_rope_index).parameters:
        grids["mm_token_type_ids"] = modalities
    return get_rope_index(ids, **grids)[0]
