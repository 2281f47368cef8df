"""Classes of cache layers, of which every transformers release has others."""

from __future__ import annotations

import functools
from typing import Any

from transformers import cache_utils


def counts_static_rows() -> bool:
    """Whether static cache layers count the rows they hold themselves (releases since 5.4)."""
    return hasattr(cache_utils.StaticLayer(1), "cumulative_length")


@functools.cache
def quantized_layer() -> Any:
    """Base class of quantized cache layers."""
    return getattr(cache_utils, "BaseQuantizedLayer", None) or cache_utils.QuantizedLayer


@functools.cache
def _layer_class(name: str, base: str = "") -> Any:
    """A class of cache layers, or a stand-in derived from `base` where there is none."""
    return getattr(cache_utils, name, type(f"No{name}", (getattr(cache_utils, base, object),), {}))


def indexed_layer() -> Any:
    """Class of the cache layers of sparse attention with an indexer (since 5.13)."""
    return _layer_class("DynamicIndexedLayer", "DynamicLayer")


def linear_layer() -> Any:
    """Class of the cache layers that hold states."""
    return _layer_class("LinearAttentionLayer")


def hybrid_layer(sliding: bool) -> Any:
    """Class of the cache layers that hold rows, or a window of them, beside states."""
    kind, base = ("SlidingWindow", "SlidingWindow") if sliding else ("Full", "")
    return _layer_class(f"LinearAttentionAnd{kind}AttentionLayer", f"Dynamic{base}Layer")


@functools.cache
def layers_without_rows() -> frozenset[type]:
    """Classes of cache layers that keep a state without a token axis, or nothing."""
    names = ("LinearAttentionLayer", "DummyLayer")
    return frozenset(getattr(cache_utils, n) for n in names if hasattr(cache_utils, n))
