"""Which rows the layers of any KV cache hold, compressed or not."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, DynamicSlidingWindowLayer, StaticLayer

from tokencomp.torchlib import compat
from tokencomp.torchlib.cache_classes import QUANTIZED

REFERENCE = "reference_sliding_attention"
# Cache layers that hold keys and values, one row per token. Layers of linear attention and of short
# convolutions hold a state instead, which has no token axis. Layers without a cache of their own
# (experts alone, or keys shared with another layer) hold nothing.
HOLDS_ROWS = CacheLayerMixin


def keeps_window(layer: Any) -> bool:
    """Whether a cache layer keeps no more rows than a sliding window needs."""
    return isinstance(layer, DynamicSlidingWindowLayer)


def is_reference(kind: type) -> bool:
    """Whether cache layers of a class keep all rows of the prompt, and a window of later ones."""
    own = getattr(kind, "_layer_type", None)
    return own == REFERENCE and not issubclass(kind, StaticLayer)


def filled(layers: Iterable[Any]) -> list[Any]:
    """Cache layers that already hold rows. A decoder may leave some layers of its cache unused."""
    return [x for x in layers if isinstance(x, HOLDS_ROWS) and x.is_initialized]


def first_layer(cache: Any, start: int = 0) -> Any:
    """The first layer from `start` on that holds rows, or None.

    Parameters
    ----------
    cache
        A KV cache, its layers, or None.
    """
    layers = cache if isinstance(cache, (list, tuple)) else getattr(cache, "layers", None)
    for layer in (layers or ())[start:]:  # no frame per layer, as every token passes here
        if isinstance(layer, HOLDS_ROWS):
            return layer
    return None


def segment_heads(layers: Sequence[Any]) -> list[Any]:
    """The first cache layer of every segment: the layers of a segment hold the same rows."""
    starts = [layer for layer in layers if getattr(layer, "starts_segment", False)]
    first = first_layer(layers)
    return starts if first is None or first in starts[:1] else [first, *starts]


def physical_length(layer: Any) -> int:
    """Rows written to a cache layer, and held unless it has a sliding window."""
    if isinstance(layer, StaticLayer):
        if not layer.is_initialized:
            return 0
        counted = getattr(layer, "cumulative_length", None)
        return int(StaticLayer.get_seq_length(layer) if counted is None else counted)
    if getattr(layer, "_layer_type", None) == REFERENCE:
        return int(layer.prefill_cumulative_length + layer.cumulative_length)
    if isinstance(layer, (QUANTIZED, DynamicSlidingWindowLayer)):
        return layer.cumulative_length
    keys = getattr(layer, "keys", None)
    return keys.shape[-2] if keys is not None and keys.numel() else 0


def stored(layer: Any, name: Literal["keys", "values"]) -> Tensor:
    """What a layer holds of its rows, (B, kv heads, rows or more, d); the first are used."""
    rows: Tensor = getattr(layer, name)
    if not isinstance(layer, QUANTIZED):
        return rows
    first: Tensor = layer._dequantize(getattr(layer, f"_quantized_{name}"))
    if getattr(layer, "_pending_beam_idx", None) is not None:
        first = first.index_select(0, layer._pending_beam_idx.to(first.device))
    return torch.cat([first, rows], dim=-2) if rows.numel() else first


def flash_on_static(config: Any, layer: Any) -> bool:
    """Whether FlashAttention gets all rows that a cache layer can hold, unwritten ones too.

    It has no other mask, but leaves out what lies behind the last column of a 2-D one.
    """
    return isinstance(layer, StaticLayer) and "flash" in compat.attention_implementation(config)
