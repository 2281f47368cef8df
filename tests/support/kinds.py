"""The oracle for decoders whose layers are of several kinds.

The full-length run of the unpatched model. Attention layers keep transformers' own mask of their
kind, in which the dropped columns are hidden too, those of earlier turns included. The mixers of
linear layers run on the kept columns alone: there, dropping a token means that it is absent.
"""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from support.oracle import Merged

CACHES = ("cache", "past_key_values", "cache_params")
MASKS = ("attention_mask", "conv_mask")
LINEAR = re.compile("GatedDeltaNet|ShortConv$|ShortConvolution$|Mamba2Mixer|LinearAttention$")


@contextlib.contextmanager
def hidden_columns(
    decoder: nn.Module, masks: list[Tensor], merged: Merged | None = None
) -> Iterator[None]:
    """Hide columns in every decoder layer: `masks` has a bool (B, L) for each. Needs eager.

    `merged` merges them into others first.
    """
    hooks = []

    def merge(module: nn.Module, args: Any, kwargs: Any) -> Any:
        """At entry; a decoder may make more of its input than the states before layer 0."""
        return args, {**kwargs, "inputs_embeds": merged(0, kwargs["inputs_embeds"])[0]}

    if merged is not None:
        hooks.append(decoder.register_forward_pre_hook(merge, with_kwargs=True))
    for i, (layer, mask) in enumerate(zip(decoder.layers, masks, strict=True)):

        def hide(module: nn.Module, args: Any, kwargs: Any, i: int = i, mask: Tensor = mask) -> Any:
            own, bias = kwargs.get("attention_mask"), None
            if merged is not None:
                x = args[0] if args else kwargs.pop("hidden_states")
                x, bias = merged(i, x) if i else (x, merged.sizes.log())
                args = (x, *args[1:])
            if own is None or own.ndim != 4:
                return args, kwargs
            # Softmax is taken in float32 even where the masks are float64.
            low, shown = torch.finfo(torch.float32).min, mask[:, None, None, -own.shape[-1] :]
            own = own if bias is None else (own.clamp(min=low) + bias[:, None, None])
            return args, {**kwargs, "attention_mask": own.masked_fill(~shown, low)}

        hooks.append(layer.register_forward_pre_hook(hide, with_kwargs=True))
    try:
        with absent_columns(decoder, masks):
            yield
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def absent_columns(decoder: nn.Module, masks: list[Tensor]) -> Iterator[None]:
    """Let the linear layers alone run on the columns (B, L) that `masks` has for each layer."""
    mixers = []
    for layer, mask in zip(decoder.layers, masks, strict=True):
        for module in layer.modules():
            if LINEAR.search(type(module).__name__):
                mixers.append(module)
                module.forward = _on_kept_columns(module.forward, mask)
    try:
        yield
    finally:
        for module in mixers:
            del module.forward


def _on_kept_columns(forward: Any, mask: Tensor) -> Any:
    def run(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        full = torch.zeros_like(hidden_states)
        one = len(mask) == 1  # several rows have states of their own, which no cache here holds
        away = MASKS if one else (*MASKS, *CACHES)
        kwargs = {k: None if k in away else v for k, v in kwargs.items()}
        for b, row in enumerate(mask[:, -hidden_states.shape[1] :]):
            out = forward(hidden_states[b : b + 1, row], **kwargs)
            full[b, row] = (out[0] if isinstance(out, tuple) else out)[0]
        return full

    return run


def continued(inputs: dict[str, Tensor], positions: Tensor, new: Tensor) -> dict[str, Tensor]:
    """Arguments of the full-length run over a prompt and the tokens (B, T) that follow it."""
    inputs, ones = dict(inputs), torch.ones_like(new)
    last = positions.max(0).values.max(-1).values if positions.ndim == 3 else positions[:, -1]
    more = last[:, None] + torch.arange(1, new.shape[1] + 1)
    more = more.expand(*positions.shape[:-1], -1) if positions.ndim == 3 else more
    inputs["position_ids"] = torch.cat([positions, more], -1)
    inputs["input_ids"] = torch.cat([inputs["input_ids"], new], 1)
    inputs["attention_mask"] = torch.cat([inputs["attention_mask"], ones], 1)
    for name in ("mm_token_type_ids", "token_type_ids"):
        if name in inputs:
            types = inputs[name]
            inputs[name] = torch.cat([types, torch.zeros_like(new).to(types)], 1)
    return inputs


def expected_logits(
    model: nn.Module,
    family: Any,
    inputs: dict[str, Tensor],
    masks: list[Tensor],
    new: Tensor,
    merged: Merged | None = None,
) -> Tensor:
    """Logits (B, L + T, V) of the oracle over the prompt and T further tokens.

    With `merged` hidden columns are merged into others first, and all is float64.
    """
    full = continued(inputs, family.positions(model, inputs), new)
    ones = torch.ones_like(new).bool()
    masks = [torch.cat([mask, ones], 1) for mask in masks]
    if merged is not None:
        model = copy.deepcopy(model).double()
        full = {k: v.double() if v.is_floating_point() else v for k, v in full.items()}
        merged.sizes = torch.ones(full["input_ids"].shape, dtype=torch.float64)
    backend = model.config.get_text_config()._attn_implementation
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad(), hidden_columns(family.decoder(model), masks, merged):
            return model(**full, use_cache=False).logits
    finally:
        model.set_attn_implementation(backend)
