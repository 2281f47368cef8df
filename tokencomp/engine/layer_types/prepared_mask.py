"""The 2-D padding mask inside a mask that was prepared for the attention backend before the call.

`generate` prepares the masks of static caches before the model runs, by logical column of the
uncompressed prompt. A compressed prompt needs another one, which transformers builds again from
the padding.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from transformers.cache_utils import StaticLayer

from tokencomp.engine.cache.rows import first_layer, physical_length
from tokencomp.engine.layer_types import mask_compat
from tokencomp.engine.layer_types.registry import FULL, LAYER_TYPES
from tokencomp.errors import UnsupportedCacheError


def split_mask(kwargs: dict[str, Any], cache: Any, body_mask: Any) -> tuple[dict[str, Any], Any]:
    """Arguments of a prefill with the 2-D mask of padding, and what the body prepared beside it.

    It is for calls whose mask is not 2-D itself; `body_mask` is that of the body, see `read_mask`.
    A prepared mask is refused beside a cache of constant length.
    """
    first, width = first_layer(cache), kwargs["inputs_embeds"].shape[1]
    past = physical_length(first)
    padding, prepared = read_mask(kwargs.get("attention_mask"), body_mask, width, past)
    if prepared is not None and isinstance(first, StaticLayer):
        raise UnsupportedCacheError(
            "the model lets tokens of an image see each other, and prepares its masks for a "
            f"{type(cache).__name__} by column of the uncompressed prompt. Drop "
            "cache_implementation=..., or turn compression off with handle.disabled()."
        )
    return {**kwargs, "attention_mask": padding}, prepared


def read_mask(mask: Any, body_mask: Any, queries: int, past: int) -> tuple[Tensor | None, Any]:
    """The padding of a decoder call, and what the body of the model has prepared beside it.

    Parameters
    ----------
    mask
        The `attention_mask` of the decoder.
    body_mask
        That of the body. Where it has more than two axes, or is a mapping, the caller has prepared
        it, and `padding_of` says what can be done.
    queries, past
        See `padding_of`.

    Returns
    -------
    padding : Tensor, shape (B, past + queries), or None
        The 2-D mask; None where every column is real.
    prepared : mask (B, heads, L, columns), mapping from layer types to such masks, or None
        None, also for a kind: plain causal attention. It is all that FlashAttention can do, for
        which a body has nothing else to prepare.
    """
    if mask is None or (isinstance(mask, Tensor) and mask.ndim == 2):
        return mask, None
    by_body = isinstance(mask, Mapping) or _dense(mask)
    if not by_body or isinstance(body_mask, Mapping) or getattr(body_mask, "ndim", 2) != 2:
        return padding_of(mask, queries, past), None
    if not isinstance(mask, Mapping):
        return body_mask, mask
    dense = {layer_type: own if _dense(own) else None for layer_type, own in mask.items()}
    return body_mask, dense if any(own is not None for own in dense.values()) else None


def _dense(mask: Any) -> bool:
    """Whether a mask says for every query what it sees."""
    return isinstance(mask, BlockMask) or (isinstance(mask, Tensor) and mask.ndim == 4)


def padding_of(mask: Any, queries: int, past: int) -> Tensor | None:
    """The 2-D mask (B, past + queries) from which `mask` was prepared.

    Parameters
    ----------
    mask
        What a decoder takes as `attention_mask`: None, a 2-D mask, a mask (B, 1, queries, columns)
        of bool or of numbers that are added to logits, or a mapping from layer types to those.
    queries
        Columns of the call.
    past
        Columns before them.

    Returns
    -------
    Tensor of bool, or None where every column is real. A 2-D mask comes back as it is.

    Raises
    ------
    UnsupportedCacheError
        The mask hides more than padding and what is to come.
    """
    if isinstance(mask, Mapping):
        attention = {
            k: m for k, m in mask.items() if k not in LAYER_TYPES or LAYER_TYPES[k].attends
        }
        if set(attention) != {FULL.name}:
            raise _refusal(f"a mask for each of {', '.join(sorted(mask))}")
        mask = mask[FULL.name]
    if mask is None or (isinstance(mask, Tensor) and mask.ndim == 2):
        return mask
    if not isinstance(mask, Tensor) or mask.ndim != 4 or mask.shape[-2] != queries:
        shape = tuple(mask.shape) if hasattr(mask, "shape") else mask
        raise _refusal(f"a {type(mask).__name__} of shape {shape}")
    visible = mask_compat.visible_columns(mask)
    if visible.shape[-1] < past + queries:
        columns = visible.shape[-1]
        raise _refusal(f"a mask of {columns} columns for {past + queries} tokens (a short cache)")
    padding = visible[:, 0, -1, : past + queries]  # the last query sees every real column
    if not mask_compat.only_padding(visible, padding, past):
        raise _refusal("a 4-D mask that hides other columns than padding on the left")
    return padding


def _refusal(description: str) -> UnsupportedCacheError:
    return UnsupportedCacheError(
        f"attention_mask is {description}, prepared before the decoder was called. A "
        "compressed prompt needs the 2-D mask of padding, or one that transformers prepared from "
        "it for a static cache with sdpa or eager attention. Pass the 2-D attention_mask "
        "of the processor."
    )
