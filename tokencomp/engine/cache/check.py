"""The check that a compressed prompt can be written to a KV cache."""

from __future__ import annotations

from typing import Any

from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticLayer

from tokencomp.engine.cache.rows import is_reference
from tokencomp.errors import UnsupportedCacheError
from tokencomp.torchlib import compat

HYBRID = {compat.hybrid_layer(sliding) for sliding in (False, True)}
DYNAMIC = frozenset({DynamicLayer, DynamicSlidingWindowLayer, compat.indexed_layer(), *HYBRID})


def check_cache(cache: Any, between_layers: bool = False) -> None:
    """Check that a compressed prompt can be written to `cache`.

    Parameters
    ----------
    between_layers
        Whether tokens leave between layers, so that layers hold different rows.

    Raises
    ------
    UnsupportedCacheError
        The cache has no layers of its own, or one of them cannot hold a compressed prompt.
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
    quantized = {k for k in kinds if issubclass(k, compat.quantized_layer())}
    kinds -= compat.layers_without_rows()  # whatever leaves the prompt, their state stays right
    reference = {k for k in kinds if is_reference(k)}
    wrong = kinds - DYNAMIC - {StaticLayer} - quantized - reference
    if wrong:
        raise UnsupportedCacheError(
            f"{type(cache).__name__} holds {_names(wrong)}; compressed prompts need layers that "
            "keep every row: DynamicLayer, StaticLayer or quantized layers. Drop "
            "cache_implementation=..., or turn compression off with handle.disabled()."
        )
    offloaded = getattr(cache, "offloading", False)
    if between_layers and (offloaded or kinds - DYNAMIC - reference):
        raise UnsupportedCacheError(
            f"{type(cache).__name__} holds {'offloaded ' * offloaded}{_names(kinds)}, and this "
            "plan drops tokens between decoder layers, which needs plain DynamicLayer rows on the "
            "device. Use the default cache, or a plan with an entry stage alone (reducers such as "
            "'condiv', 'divprune' or 'merge')."
        )


def _names(kinds: set[type]) -> str:
    return ", ".join(sorted(kind.__name__ for kind in kinds))
