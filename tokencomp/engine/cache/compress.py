"""Checks that a cache can hold a compressed prompt, and notes in its layers what has left."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import StaticLayer

from tokencomp.engine.cache.layers import (
    CompressedDynamicLayer,
    CompressedIndexedLayer,
    CompressedLayer,
    CompressedSlidingLayer,
)
from tokencomp.engine.cache.owner import CacheOwner
from tokencomp.engine.cache.repeat import repeat_rows, repeated
from tokencomp.engine.cache.rows import (
    filled,
    first_layer,
    flash_on_static,
    is_reference,
    segment_heads,
)
from tokencomp.engine.cache.special import (
    CompressedHybridLayer,
    CompressedHybridSlidingLayer,
    CompressedReferenceLayer,
    compressed_reference,
)
from tokencomp.engine.cache.static import CompressedStaticLayer
from tokencomp.engine.stage.forward import ForwardPass
from tokencomp.errors import UnsupportedCacheError
from tokencomp.torchlib.cache_classes import QUANTIZED, WITHOUT_ROWS

# Compressed classes by transformers' own; others enter when a cache has them.
_COMPRESSED: dict[type, type] = {
    own.plain: own
    for own in (
        CompressedDynamicLayer,
        CompressedSlidingLayer,
        CompressedStaticLayer,
        CompressedIndexedLayer,
        CompressedHybridLayer,
        CompressedHybridSlidingLayer,
    )
}
DYNAMIC = frozenset(_COMPRESSED) - {StaticLayer}


def check_cache(cache: Any, between_layers: bool = False) -> None:
    """Refuse a cache to which no compressed prompt can be written.

    With `between_layers`, tokens leave between layers, so that these hold different rows.
    """
    if cache is None:
        return
    layers = getattr(cache, "layers", None)
    if layers is None:
        raise UnsupportedCacheError(
            f"{type(cache).__name__}: continuous batching and legacy caches hold rows that cannot "
            "differ per layer. Use generate() with a DynamicCache (the default)."
        )
    replicate = getattr(cache, "layer_class_to_replicate", None)
    kinds = {getattr(layer, "plain", type(layer)) for layer in layers}
    kinds |= {replicate} if replicate else set()
    quantized = {k for k in kinds if issubclass(k, QUANTIZED)}
    # Whatever leaves the prompt, the state of layers without rows stays right.
    kinds -= WITHOUT_ROWS
    special = kinds - DYNAMIC - {StaticLayer} - quantized
    wrong = {kind for kind in special if not is_reference(kind)}
    if wrong:
        raise UnsupportedCacheError(
            f"{type(cache).__name__} holds {_names(wrong)}; compressed prompts need layers that "
            "keep every row: DynamicLayer, StaticLayer or quantized layers. Drop "
            "cache_implementation=..., or turn compression off with handle.disabled()."
        )
    offloaded = getattr(cache, "offloading", False)
    if between_layers and (offloaded or kinds - DYNAMIC - special):
        raise UnsupportedCacheError(
            f"{type(cache).__name__} holds {'offloaded ' * offloaded}{_names(kinds)}, and this "
            "plan drops tokens between decoder layers, which needs plain DynamicLayer rows on the "
            "device. Use the default cache, or a plan with an entry stage alone (reducers such as "
            "'condiv', 'divprune' or 'bipartite')."
        )


def _names(kinds: set[type]) -> str:
    return ", ".join(sorted(kind.__name__ for kind in kinds))


def _compressed_class(plain: type) -> type:
    """The compressed class of a class of cache layers that `_COMPRESSED` does not have yet."""
    if is_reference(plain):
        return compressed_reference(plain)
    # Rows are quantized as before: only the counting changes.
    return type(f"Compressed{plain.__name__}", (CompressedLayer, plain), {"plain": plain})


def compress_layer(
    layer: Any,
    dropped: int,
    valid: Tensor | None,
    starts_segment: bool,
    columns: Tensor | None = None,
    starts: Tensor | None = None,
) -> None:
    """Make `layer` a compressed one (if it is none yet) with `dropped` more tokens left out.

    Parameters
    ----------
    valid, starts_segment, columns, starts
        See `CompressedLayer`.
    """
    before = 0
    if isinstance(layer, CompressedLayer):
        before, starts_segment = layer.dropped, starts_segment or layer.starts_segment
    else:
        plain = type(layer)
        if plain not in _COMPRESSED:
            _COMPRESSED[plain] = _compressed_class(plain)
        layer.__class__ = _COMPRESSED[plain]
    layer.dropped, layer._valid = before + dropped, None
    if valid is not None:
        layer.valid = valid
    layer.columns, layer.starts_segment, layer.starts = columns, starts_segment, starts
    if isinstance(layer, CompressedStaticLayer):
        layer.offset = torch.tensor(layer.dropped, device=layer.device)
    if isinstance(layer, CompressedReferenceLayer):
        layer.shorten_prompt(dropped)


def compact_cache(forward: ForwardPass, cache: Any, owner: CacheOwner) -> Any:
    """Record in the cache layers that a prefill has filled which tokens their rows stand for.

    Gives the first layer of the cache that holds rows, or None.
    """
    if cache is not forward.cache:
        check_cache(cache, bool(forward.plan.layer_stages))
    first = first_layer(cache)
    if first is None or first.keys is None:  # checkpointed layers write nothing
        return first
    layers, starts = cache.layers, forward.starts()
    for segment in forward.segments:
        last = segment is forward.segments[-1]  # a layer that runs twice has two cache layers
        own = filled(layers[segment.first : None if last else segment.stop])
        if not own:
            continue
        device, batch = own[0].device, len(segment.layout.lengths)
        sizes, index = segment.layout.sizes, None
        if sizes is not None and forward.merges:
            segment, index = repeated(segment, sizes.to(device))
            forward.repeated[segment.first] = segment.layout.lengths
        valid = segment.all_valid(segment.layout.valid(device))
        dropped = forward.width - segment.layout.width
        columns = segment.columns(batch, device)
        for layer in own:
            if index is not None:
                repeat_rows(layer, index, segment.physical)
            begins = layer is own[0] and segment.first > 0
            flags = valid if valid is None else valid.to(layer.device)
            compress_layer(layer, dropped, flags, begins, columns, starts)
    _note_owner(forward, layers, owner)
    return first


def _note_owner(forward: ForwardPass, layers: list[Any], owner: CacheOwner) -> None:
    """Let the layers of a cache know the patch, and up to which length a step needs no mask."""
    heads, layer_types = segment_heads(layers), forward.layer_types
    masked = owner.compact or layer_types.relative or layer_types.cut_later_turns
    masked |= any(head._valid is not None for head in heads)
    masked |= flash_on_static(forward.adapter.text_config, heads[0])
    masked |= layer_types.rows_kept(layers) is not None or layer_types.masks_single_tokens
    # transformers leaves a mask out only below the window, so that at the window it is ours too.
    below = 0.0 if masked else layer_types.smallest - 1
    for layer in filled(layers):
        layer.owner, layer.seen_below = owner, below


def extend_valid(forward: ForwardPass, cache: Any) -> None:
    """Note padding among later tokens (the cache layers assume there is none)."""
    if forward.new is None or cache is None:
        return
    for segment in forward.segments:
        valid = segment.all_valid(forward.new)
        for layer in filled(cache.layers[segment.first : segment.stop]):
            layer.valid = valid
