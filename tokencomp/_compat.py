"""Every difference between transformers releases (4.57 … 5.x), by feature detection."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

from tokencomp.errors import UnsupportedModelError

CACHE_NAMES = ("cache", "past_key_values", "past_key_value")


def get_cache(kwargs: Mapping[str, Any], out: Any = None) -> Any:
    """The KV cache of a call, from its arguments or (where the callee made it) its output."""
    for name in CACHE_NAMES:
        if kwargs.get(name) is not None:
            return kwargs[name]
    for name in CACHE_NAMES:
        found = getattr(out, name, None)
        if found is not None:
            return found
    if isinstance(out, tuple) and len(out) > 1 and hasattr(out[1], "layers"):
        return out[1]
    return None


def bind(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a `module(...)` call by name."""
    if not args:
        return kwargs
    names = [p for p in inspect.signature(module.forward).parameters if p not in ("args", "kwargs")]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def set_cache_position(kwargs: MutableMapping[str, Any], start: int, n: int) -> None:
    """Renumber `cache_position` (releases before 5.4) to `n` rows that follow `start`."""
    old = kwargs.get("cache_position")
    if old is not None:
        kwargs["cache_position"] = torch.arange(start, start + n, device=old.device)


class MaskView:
    """The part of a cache that HF mask code reads, frozen at the start of a forward call.

    Layers of one cache can hold different numbers of rows, and some have already been written
    when a later layer's mask is built; this view answers for one layer at the call's start.
    """

    is_compileable = False
    is_sliding = (False,)

    def __init__(self, physical: int, dropped: int) -> None:
        self.physical, self.dropped = physical, dropped

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.physical + self.dropped

    get_query_offset = get_seq_length

    def get_mask_sizes(self, query: int | Tensor, layer_idx: int = 0) -> tuple[int, int]:
        n = query if isinstance(query, int) else query.shape[0]
        return self.physical + n, self.dropped


def causal_mask(config: Any, hidden: Tensor, mask: Tensor | None, view: MaskView) -> Any:
    """Transformers' own causal mask for one layer, whatever the attention backend.

    Parameters
    ----------
    hidden : Tensor, shape (B, q, d)
        Read for its batch size, length, dtype and device.
    mask : Tensor of bool, shape (B, dropped + physical + q), or None
    """
    from transformers.masking_utils import create_causal_mask

    names = inspect.signature(create_causal_mask).parameters
    call: dict[str, Any] = {"config": config, "attention_mask": mask}
    call["inputs_embeds" if "inputs_embeds" in names else "input_embeds"] = hidden
    call["cache" if "cache" in names else "past_key_values"] = view
    if "cache_position" in names:
        start = view.get_seq_length()
        call["cache_position"] = torch.arange(start, start + hidden.shape[1], device=hidden.device)
    return create_causal_mask(**call)


def attention_implementation(config: Any) -> str:
    """Name of the attention backend ("sdpa", "eager", "flash_attention_2", ...)."""
    return str(getattr(config, "_attn_implementation", None) or "sdpa")


def _mrope_section(attn: nn.Module) -> list[int]:
    sources = (attn, getattr(attn, "config", None))
    for source in sources:
        for name in ("rope_parameters", "rope_scaling"):
            found = getattr(source, name, None)
            if isinstance(found, Mapping) and "mrope_section" in found:
                return list(found["mrope_section"])
    raise UnsupportedModelError(
        f"{type(attn).__name__} gets three-row rotary tables but names no mrope_section."
    )


def rotate(attn: nn.Module, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply the model's own rotary embedding to x, shape (B, H, L, D).

    cos, sin: shape (B, L, D), or (3, B, L, D) for M-RoPE before transformers 5.17.
    """
    module = sys.modules[type(attn).__module__]
    if cos.ndim == 4:
        multimodal = getattr(module, "apply_multimodal_rotary_pos_emb", None)
        if multimodal is None:
            raise UnsupportedModelError(
                f"{type(attn).__name__}: unknown multimodal rotary embedding; tested with "
                "transformers 4.57 to 5.24."
            )
        return multimodal(x, x, cos, sin, _mrope_section(attn))[0]
    apply = getattr(module, "apply_rotary_pos_emb", None)
    if apply is None:
        raise UnsupportedModelError(f"{type(attn).__name__}: no rotary embedding in its module.")
    return apply(x, x, cos, sin)[0]


def sequence_dim(table: Tensor) -> int:
    """Axis of a rotary table (B, L, D) or (3, B, L, D) that runs over the sequence."""
    return table.ndim - 2
