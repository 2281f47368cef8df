"""Calls that cannot be compressed, or not exactly: refused with the fix before anything is done."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from tokencomp import _compat
from tokencomp.adapters.base import Adapter
from tokencomp.errors import (
    AlreadyCompressedError,
    AttentionOutputError,
    OptionError,
    UnsupportedCacheError,
)


def check_prefill(
    adapter: Adapter,
    kwargs: Mapping[str, Any],
    kinds: Tensor,
    between_layers: bool,
    proportional: bool,
) -> None:
    """Look at the arguments of a decoder call with visual tokens.

    Parameters
    ----------
    kinds : Tensor, shape (B, L)
        Of the prompt, see `Adapter.kinds`.
    between_layers
        Whether tokens leave between layers.
    proportional
        Whether sizes of merged tokens are added to the attention logits.

    Raises
    ------
    AlreadyCompressedError, UnsupportedCacheError, AttentionOutputError, OptionError
    """
    shape, mask = kwargs["inputs_embeds"].shape[:2], kwargs.get("attention_mask")
    if shape != kinds.shape:
        raise AlreadyCompressedError(
            f"the decoder got {tuple(shape)} tokens for a prompt of {tuple(kinds.shape)}: "
            "something else already shortened it. Undo the other method before patch()."
        )
    if isinstance(mask, dict) or (mask is not None and mask.ndim != 2):
        raise UnsupportedCacheError(
            "the attention mask was prepared before the decoder (static cache, or a custom 4-D "
            "mask). Use the default DynamicCache and a 2-D attention_mask."
        )
    if between_layers and _wants_attentions(adapter, kwargs):
        raise AttentionOutputError(
            "output_attentions=True with tokens dropped between layers: attention maps would "
            "differ in size. Use an entry reducer, or handle.disabled()."
        )
    if _compat.recomputed(adapter.layers[0]):
        _check_recomputation(between_layers, proportional)


def _wants_attentions(adapter: Adapter, kwargs: Mapping[str, Any]) -> bool:
    """Whether the call returns attention maps, by its arguments or else by the config."""
    asked = kwargs.get("output_attentions")
    if asked is None:
        configs = (adapter.top.config, adapter.text_config)
        return any(getattr(config, "output_attentions", False) for config in configs)
    return bool(asked)


def _check_recomputation(between_layers: bool, proportional: bool) -> None:
    """Refuse what a checkpointed layer would compute in another way in the backward pass."""
    fix = "or model.gradient_checkpointing_disable()."
    if between_layers and _compat.recomputes_hooks():
        raise OptionError(
            "gradient checkpointing with tokens dropped between layers: this transformers release "
            "would drop them again in the backward pass. Use transformers >= 5.23, an entry "
            f"reducer, {fix}"
        )
    if proportional:
        raise OptionError(
            "gradient checkpointing with proportional attention: token sizes are gone in the "
            f"backward pass. Use patch(..., proportional_attention=False), {fix}"
        )
