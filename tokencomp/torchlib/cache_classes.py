"""Classes of cache layers that differ between transformers releases."""

from __future__ import annotations

from typing import Any

from transformers import cache_utils


def _layer_class(name: str, base: str = "") -> Any:
    """A class of `cache_utils`; in releases without it, an unused stand-in derived from `base`."""
    return getattr(cache_utils, name, type(f"No{name}", (getattr(cache_utils, base, object),), {}))


QUANTIZED: Any = getattr(cache_utils, "BaseQuantizedLayer", None) or cache_utils.QuantizedLayer
"""Base class of quantized cache layers."""
INDEXED: Any = _layer_class("DynamicIndexedLayer", "DynamicLayer")
"""Class of cache layers of sparse attention with an indexer (since 5.13)."""
STATES: Any = cache_utils.LinearAttentionLayer
"""Class of cache layers that hold a recurrent state."""
HYBRID: Any = cache_utils.LinearAttentionAndFullAttentionLayer
HYBRID_SLIDING: Any = _layer_class(
    "LinearAttentionAndSlidingWindowAttentionLayer", "DynamicSlidingWindowLayer"
)
"""Classes of cache layers with both a state and rows; `HYBRID_SLIDING` holds a window of rows."""
WITHOUT_ROWS: frozenset[Any] = frozenset({STATES, _layer_class("DummyLayer")})
"""Classes of cache layers that keep a state without a token axis, or nothing."""
