"""Turns a cache layer of transformers into the compressed one of its class."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticLayer

from tokencomp.engine.cache.hybrid import (
    HYBRID,
    HYBRID_SLIDING,
    CompressedHybridLayer,
    CompressedHybridSlidingLayer,
)
from tokencomp.engine.cache.layers import (
    INDEXED,
    CompressedDynamicLayer,
    CompressedIndexedLayer,
    CompressedLayer,
    CompressedSlidingLayer,
)
from tokencomp.engine.cache.reference import CompressedReferenceLayer, compressed_reference
from tokencomp.engine.cache.rows import is_reference
from tokencomp.engine.cache.static import COUNTS_ROWS, CompressedStaticLayer

# Compressed classes by transformers' own; others enter when a cache has them.
_COMPRESSED: dict[type, type] = {
    DynamicLayer: CompressedDynamicLayer,
    DynamicSlidingWindowLayer: CompressedSlidingLayer,
    StaticLayer: CompressedStaticLayer,
    INDEXED: CompressedIndexedLayer,
    HYBRID: CompressedHybridLayer,
    HYBRID_SLIDING: CompressedHybridSlidingLayer,
}


def _compressed_class(plain: type) -> type:
    """The compressed class of a class of cache layers that `_COMPRESSED` does not have yet."""
    if is_reference(plain):
        return compressed_reference(plain)
    # Rows are quantized as before: only the counting changes.
    return type(f"Compressed{plain.__name__}", (CompressedLayer, plain), {"plain": plain})


def compress_layer(
    layer: Any,
    dropped: int,
    rows: int,
    valid: Tensor | None,
    starts_segment: bool,
    sizes: Tensor | None = None,
    columns: Tensor | None = None,
    starts: Tensor | None = None,
) -> None:
    """Make `layer` a compressed one (if it is none yet) with `dropped` more tokens left out.

    Parameters
    ----------
    rows
        Rows that the layer holds.
    valid, starts_segment, sizes, columns, starts
        See `CompressedLayer`.
    """
    before = 0
    if isinstance(layer, CompressedLayer):
        before, starts_segment = layer.dropped, starts_segment or layer.starts_segment
    else:
        static, plain = isinstance(layer, StaticLayer), type(layer)
        if plain not in _COMPRESSED:
            _COMPRESSED[plain] = _compressed_class(plain)
        layer.__class__ = _COMPRESSED[plain]
        if static and not COUNTS_ROWS:
            layer.cumulative_length = torch.tensor(rows, device=layer.device)
            torch._dynamo.mark_static_address(layer.cumulative_length)
    layer.dropped, layer.sizes, layer._valid = before + dropped, sizes, None
    if valid is not None:
        layer.valid = valid
    layer.columns, layer.starts_segment, layer.starts = columns, starts_segment, starts
    if isinstance(layer, CompressedStaticLayer):
        layer.offset = torch.tensor(layer.dropped, device=layer.device)
    if isinstance(layer, CompressedReferenceLayer):
        layer.shorten_prompt(dropped)
