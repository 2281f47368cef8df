"""Merging with weights in MLX: a merged token gets the attention of all tokens that it represents.

Attention to a key grows by the logarithm of its size, the number of tokens that its row represents.
The logarithm is one more column of the row, so that decode steps, chunks of a prompt, batches and
all caches of mlx-vlm need nothing else:

    embeddings (1, L, d)   | d features | log |     from `patch` to the first decoder layer
    keys and values        | head       | log |     in the cache
    attention              | head |  with log in the mask, per key

Kernels get heads of the usual size. The logarithm has the dtype of the model.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_vlm.models.cache import KVCache

from tokencomp.errors import UnsupportedCacheError, UnsupportedModelError
from tokencomp.torchlib.replace import Installed, MethodReplacement

ATTENTION = "scaled_dot_product_attention"
QUANTIZED = (
    "a quantized KV cache (kv_bits) has no room for the weights of merged tokens. Leave kv_bits "
    "out, or patch with merge=False."
)


def with_weights(embeds: mx.array, sizes: np.ndarray) -> mx.array:
    """Embeddings (B, L, d) with the logarithms of sizes (L,) as one more column."""
    logs = mx.broadcast_to(mx.array(np.log(sizes))[None, :, None], (*embeds.shape[:2], 1))
    return mx.concatenate([embeds, logs.astype(embeds.dtype)], axis=-1)


class LayerWeights(Installed):
    """Gives attention layers of a decoder of mlx-vlm the weights of rows, until `remove`.

    Their classes become subclasses that widen what the cache stores. The attention function of
    their module is replaced; it treats keys of the usual width as before.
    """

    def __init__(self, decoder: Any) -> None:
        self._width = int(decoder.layers[0].input_layernorm.weight.shape[0])
        self._logs: mx.array | None = None  # (B, L) of the rows of this pass; None: all weigh 1
        self._weighed = False
        self._classes = [(layer, type(layer)) for layer in decoder.layers]
        attentions = [layer.self_attn for layer in decoder.layers if "self_attn" in layer]
        for name in {type(attention).__module__ for attention in attentions}:
            self._handles.append(MethodReplacement(sys.modules[name], ATTENTION, self._attend))
        for layer, own in self._classes:
            first = layer is decoder.layers[0]
            object.__setattr__(layer, "__class__", self._subclass(own, first))

    def remove(self) -> None:
        """Restore classes and functions. Safe to call twice."""
        super().remove()
        for layer, own in self._classes:
            object.__setattr__(layer, "__class__", own)
        self._classes = []

    def _subclass(self, own: type, first: bool) -> type:
        """The class of a layer, whose calls give weights to its attention."""
        original: Any = own.__call__
        signature = inspect.signature(original)

        def call(layer: Any, *args: Any, **kwargs: Any) -> Any:
            given = signature.bind(layer, *args, **kwargs)
            if first:  # the column of weights is for attention alone
                x = given.arguments["x"]
                self._logs = x[..., self._width] if x.shape[-1] > self._width else None
                given.arguments["x"] = x[..., : self._width]
            if "self_attn" not in layer:  # linear attention sees a merged token once
                return original(*given.args, **given.kwargs)
            cache = given.arguments.get("cache")
            given.arguments["cache"] = cache = KVCache() if cache is None else cache
            if hasattr(cache, "bits"):
                raise UnsupportedCacheError(QUANTIZED)
            wide, self._weighed = MethodReplacement(cache, "update_and_fetch", self._update), False
            try:
                out = original(*given.args, **given.kwargs)
            finally:
                wide.remove()
            if not self._weighed:
                raise UnsupportedModelError(
                    f"the attention of {own.__name__} has not asked for the weights of merged "
                    "tokens. Patch with merge=False."
                )
            return out

        return type(own.__name__, (own,), {"__call__": call, "__module__": own.__module__})

    def _update(self, original: Callable[..., Any], keys: mx.array, values: mx.array) -> Any:
        """Store keys and values (B, heads, L, d) of this pass, with the column of weights."""
        logs = mx.zeros((len(keys), keys.shape[2])) if self._logs is None else self._logs
        column = mx.broadcast_to(logs[:, None, :, None], (*keys.shape[:3], 1)).astype(keys.dtype)
        pair = original(*(mx.concatenate([x, column], axis=-1) for x in (keys, values)))
        if not isinstance(pair[0], mx.array):
            raise UnsupportedCacheError(QUANTIZED)
        return pair

    def _attend(
        self,
        original: Callable[..., Any],
        queries: mx.array,
        keys: Any,
        values: Any,
        cache: Any,
        *,
        mask: Any,
        **kwargs: Any,
    ) -> Any:
        """Attention with the weights of the keys in its mask, if the keys have any."""
        width = queries.shape[-1]
        if isinstance(keys, mx.array) and keys.shape[-1] > width:
            logs = keys[:, :1, :, width][:, :, None].astype(queries.dtype)
            mask, self._weighed = with_bias(mask, logs, queries.shape[2]), True
            keys, values = keys[..., :width], values[..., :width]
        return original(queries, keys, values, cache, mask=mask, **kwargs)


def with_bias(mask: Any, logs: mx.array, rows: int) -> mx.array:
    """A mask of mlx-vlm for queries of `rows` rows, plus logs (B, 1, 1, keys), as numbers."""
    if mask is None:
        return logs
    if isinstance(mask, str):  # "causal"
        keys = mx.arange(logs.shape[-1])
        mask = keys[-rows:, None] >= keys
    if mask.dtype != mx.bool_:
        return mask + logs
    # Half of the smallest number: a sum with it stays finite, also in rows that see nothing.
    return mx.where(mask, logs, mx.array(mx.finfo(logs.dtype).min / 2, logs.dtype))
