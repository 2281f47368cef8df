"""What a compressed prefill, and later tokens, leave in their cache."""

from __future__ import annotations

from typing import Any

from tokencomp.engine.cache.compress import check_cache, compress_layer
from tokencomp.engine.cache.need import InForce, PatchNeed
from tokencomp.engine.cache.rows import filled, first_layer, segment_heads
from tokencomp.engine.kinds.mask_compat import flash_on_static
from tokencomp.engine.stage.forward import ForwardPass


def compact_cache(forward: ForwardPass, cache: Any, patch: InForce) -> None:
    """Record in the cache layers that a prefill has filled which tokens their rows stand for.

    Parameters
    ----------
    patch
        The patch under which the prefill has run.

    Raises
    ------
    UnsupportedCacheError
        The callee created a cache whose layers cannot be compressed.
    """
    check_cache(cache, bool(forward.plan.layer_stages))
    first = first_layer(cache)
    if first is None or first.keys is None:  # checkpointed layers write nothing
        return
    layers = cache.layers
    for segment in forward.segments:
        own = filled(layers[segment.first : segment.stop])
        if not own:
            continue
        device, batch = own[0].device, len(segment.layout.lengths)
        valid = segment.all_valid(segment.layout.valid(device))
        sizes = forward.weights(segment)
        dropped = forward.width - segment.layout.width
        rows, columns = segment.physical + segment.layout.width, segment.columns(batch, device)
        starts = forward.starts()
        for layer in own:
            begins = layer is own[0] and segment.first > 0
            flags = valid if valid is None else valid.to(layer.device)
            compress_layer(layer, dropped, rows, flags, begins, sizes, columns, starts)
            patch.weights |= sizes is not None
    _note_patch(forward, layers, patch)


def _note_patch(forward: ForwardPass, layers: list[Any], patch: InForce) -> None:
    """Let the layers of a cache know the patch, and whether later tokens can do without."""
    heads, windows = segment_heads(layers), forward.windows
    needed = len(heads) > 1 or patch.compact or bool(windows.sizes) or windows.relative
    needed |= any(head.valid is not None or head.sizes is not None for head in heads)
    needed |= flash_on_static(forward.adapter.text_config, heads[0])
    need = PatchNeed() if needed or windows.cut_later_turns else None
    whole = need is None and windows.rows_kept(layers) is None
    whole &= not any(kind.masks_single_tokens for kind in windows.kinds)
    for layer in filled(layers):
        layer.patch, layer.needs_patch, layer.seen_whole = patch, need, whole


def extend_valid(forward: ForwardPass, cache: Any) -> None:
    """Note padding among later tokens (the cache layers assume there is none)."""
    if forward.new is None or cache is None:
        return
    for segment in forward.segments:
        valid = segment.all_valid(forward.new)
        for layer in filled(cache.layers[segment.first : segment.stop]):
            layer.valid = valid
