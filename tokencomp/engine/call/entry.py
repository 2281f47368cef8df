"""The entry stage of a prefill, and the decoder arguments that follow from it."""

from __future__ import annotations

import functools
from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor

from tokencomp.adapters.base import Adapter
from tokencomp.adapters.structure import scales_queries
from tokencomp.engine.cache.rows import first_layer
from tokencomp.engine.layer_types.types import check_windows
from tokencomp.engine.rows.arguments import gather_arguments, sequence_lengths, text_positions
from tokencomp.engine.stage.forward import ForwardPass
from tokencomp.errors import (
    OptionError,
    RowIndexedAttentionError,
    UnsupportedCacheError,
    UnsupportedModelError,
)
from tokencomp.torchlib import compat

RAGGED_TURN = (
    "a later turn brings media, and its samples keep different numbers of tokens. Layers of linear "
    "attention or convolution would take the padding between the turns for tokens, as they do "
    "without compression. Give turns of equal size, one sample at a time, or the whole "
    "conversation as one prompt."
)


LATER_MEDIA = (
    "a later turn brings media. {} keeps only a window of {} tokens of every turn after the first, "
    "so they would be cut. Give the whole conversation as one prompt, whose tokens are all seen."
)


def enter_prompt(
    forward: ForwardPass, positions: Tensor, arguments: dict[str, Any], compact: bool
) -> None:
    """Apply the entry stage, and set embeddings, positions and masks of the decoder call in place.

    Parameters
    ----------
    positions : Tensor of int64, shape (3, B, L) for M-RoPE, else (B, L)
        Positions of the uncompressed call.
    arguments
        Arguments of the decoder by name, with the 2-D mask of padding.
    compact
        Whether positions count the kept tokens only.
    """
    adapter, cache = forward.adapter, forward.cache
    forward.by_column = not compact
    first, layer = forward.segments[0], first_layer(cache)
    # A decode step on a static cache reads no length on the host, so its whole length counts.
    room = getattr(layer, "max_cache_len", 0)
    before = first.logical
    if first.physical and forward.layer_types.cut_later_turns:
        name, window = type(adapter.decoder).__name__, layer.sliding_window
        raise UnsupportedCacheError(LATER_MEDIA.format(name, window))
    check = functools.partial(
        check_windows,
        adapter.decoder,
        forward.layer_types,
        by_column=forward.by_column,
        packed=forward.layout.packed,
        layers=getattr(cache, "layers", ()),
    )
    if compact:
        _check_prepared(forward, before + forward.width)
    else:  # refused before any work: the reduction does not change this length
        check(length := max(before + forward.width, room))
    _check_temperature(adapter, before + forward.width)
    x, positions, index = forward.entry(arguments["inputs_embeds"], positions)
    valid = forward.layout.valid(x.device)
    if index is not None:
        gather_arguments(arguments, index, valid, forward.width)
    if forward.layout.packed:
        arguments.update(sequence_lengths(forward.layout, arguments))
        if cache is None and not arguments.get("use_cache"):
            valid = None  # padding is kept apart like a prompt of its own
    arguments["inputs_embeds"] = x
    if compact:
        forward.tables.clear()  # those of the original positions
        positions = _compact_positions(forward, valid, x)
        check(length := max(first.physical + x.shape[1], room))
    own_ids = _set_positions(forward, arguments, positions)
    if valid is not None and first.physical and forward.layer_types.linear:
        raise UnsupportedCacheError(RAGGED_TURN)
    if own_ids and valid is None:  # with a mask, transformers looks for no packed prompts
        valid = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    source = None
    if forward.prepared is not None or not forward.layer_types.plain:
        source = forward.mask_source(valid, cache)
    if source is not None and source.explicit(first, length):
        arguments["attention_mask"] = source.decoder_mask(first, x)
    else:
        arguments["attention_mask"] = first.call_mask(adapter.text_config, layer, valid, x)
    compat.set_cache_position(arguments, before, x.shape[1])


def _check_prepared(forward: ForwardPass, length: int) -> None:
    """Refuse compact positions beside a window that the body of the model has already applied.

    Its masks let the tokens of an image see each other, which nothing could build again, and their
    windows count columns of the uncompressed sequence of `length` tokens.
    """
    size = forward.layer_types.smallest
    if forward.prepared is not None and length > size:
        body = type(forward.adapter.body).__name__
        raise OptionError(
            f'positions="compact": {body} prepares the masks of its layers '
            f"with a window of {size} tokens, measured in the {length} tokens of the uncompressed "
            'prompt, and not in those that are kept. Use positions="original" (the default).'
        )


def _check_temperature(adapter: Adapter, length: int) -> None:
    """Refuse prompts in which layers scale queries by their row, see `row_scales`."""
    for name, limit in adapter.row_scales.items():
        if limit and length >= limit:
            raise RowIndexedAttentionError(
                f"the prompt has {length} tokens, and layers of {type(adapter.decoder).__name__} "
                f"scale queries by the number of their row from {limit:g} on ({name}), so that "
                "dropping would not equal masking. Give a shorter prompt, or turn compression off "
                "with handle.disabled()."
            )


def _set_positions(
    forward: ForwardPass, arguments: MutableMapping[str, Any], positions: Tensor
) -> bool:
    """Write the positions of a compressed call to the arguments of the decoder.

    Text positions of kept tokens have gaps, which FlashAttention, and mask code where there is no
    mask, take for the begin of another packed prompt. There they get positions without gaps, and
    the rotary embedding alone gets the true `positions`, (3, B, n) for M-RoPE, else (B, n).

    Returns
    -------
    bool
        Whether `position_ids` are the true positions, so that the call needs a mask.
    """
    adapter = forward.adapter
    text = text_positions(forward.layout, positions.device)
    if adapter.mrope_rows > 3:  # HunyuanVL takes no row for text beside its own
        arguments["position_ids"] = positions
        return False
    if adapter.mrope:
        text = text.expand(positions.shape[1], -1)[None]
        arguments["position_ids"] = torch.cat([text, positions])
        return False
    flash = "flash" in compat.attention_implementation(adapter.text_config)
    if adapter.layers_read_positions and not flash and not forward.layout.packed:
        arguments["position_ids"] = positions
        return True
    if adapter.rotary is None or scales_queries(adapter.text_config):
        raise UnsupportedModelError(
            f"the layers of {type(adapter.decoder).__name__} read positions themselves, and "
            "FlashAttention and packed prompts need positions without gaps there. Use "
            'attn_implementation="sdpa" and one prompt per row.'
        )
    forward.rotary, arguments["position_ids"] = positions, text
    return False


def _compact_positions(forward: ForwardPass, valid: Tensor | None, x: Tensor) -> Tensor:
    """Positions (B, n) without gaps, which begin again in every prompt of a packed row.

    `x` (B, n, d) are the embeddings behind the entry stage, and `valid` (B, n) is False at padding.
    """
    if forward.layout.packed:
        return text_positions(forward.layout, x.device).expand(x.shape[0], -1)
    return forward.segments[0].contiguous(valid, x)
