"""Eviction from a KV cache, and marks to which a conversation can be rewound.

Rows are evicted permanently; kept rows keep their positions, so nothing is recomputed. Later tokens
attend to them as if their mask hid the evicted columns. The oracle is therefore a *staircase mask*:
in a run of full length, tokens after the eviction do not see the evicted columns, tokens before it
do.

    token  0  1  2  3  4  5        columns 1 and 2 are evicted after token 3
    3      x  x  x  x
    4      x        x  x
    5      x        x  x  x
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from tokencomp.adapters.base import Adapter
from tokencomp.engine.cache import WHOLE, CompressedLayer, compress_layer, physical_length
from tokencomp.engine.layer_types import Indexed, LayerTypes
from tokencomp.engine.rowmap import RowMap
from tokencomp.errors import OptionError, UnsupportedCacheError, UnsupportedModelError
from tokencomp.torchlib.cache_classes import STATES


def row_map_of(layer: Any) -> RowMap:
    """The row map of a cache layer, compressed or not."""
    if isinstance(layer, CompressedLayer):
        return layer.current_map
    return RowMap(physical_length(layer))


def held_columns(layer: Any) -> Tensor:
    """Column of every row of a cache layer, int64 (B, rows)."""
    return row_map_of(layer).all_columns(layer.keys.shape[0], layer.keys.device)


def check_eviction(adapter: Adapter) -> None:
    """Refuse decoders in which eviction differs from a staircase mask.

    Raises
    ------
    UnsupportedModelError
        A layer has a recurrent state, a window of rows, or an indexer, or attention depends on the
        number or distance of rows.
    """
    layer_types = LayerTypes.of(adapter.decoder)
    reasons = {
        "layers of linear attention or convolution, whose state cannot forget a token": (
            layer_types.linear
        ),
        "layers with an attention window, whose cache has let rows go already": bool(
            layer_types.sizes or layer_types.cut or layer_types.cut_later_turns
        ),
        "layers with an indexer, which holds its rows apart": any(
            isinstance(kind, Indexed) for kind in layer_types.types
        ),
        "attention with a bias by distance": layer_types.relative,
        "queries that are scaled by the number of their row": bool(adapter.row_scales),
    }
    found = [reason for reason, holds in reasons.items() if holds]
    if found:
        raise UnsupportedModelError(
            f"rows cannot be evicted from the cache of {type(adapter.decoder).__name__}: it has "
            f"{' and '.join(found)}. Allowed are decoders that attend to every row of the cache in "
            "every layer. Keep all rows (in a session: budget=None), or take such a model."
        )


def evict(cache: Any, columns: Tensor) -> int:
    """Evict the rows of some columns from every layer of a cache, in place.

    Layers without rows of these columns, because they were dropped before, do not change. Call
    `check_eviction` first: a cache does not show what its decoder does.

    Parameters
    ----------
    cache
        A `DynamicCache`, compressed or not, of one or several equal samples.
    columns : Tensor of int64, shape (n,)
        Columns of the uncompressed sequence, over all calls.

    Returns
    -------
    int
        Number of rows evicted from the layer that lost most.

    Raises
    ------
    UnsupportedCacheError
        Layers of another class, or samples that hold different rows; nothing is evicted.
    OptionError
        A layer would be empty; nothing is evicted.
    """
    every = getattr(cache, "layers", ())
    layers = [x for x in every if type(x) in WHOLE and x.is_initialized]
    rows_or_states = [x for x in every if isinstance(x, (CacheLayerMixin, STATES))]
    wrong = sorted({type(x).__name__ for x in rows_or_states if type(x) not in WHOLE})
    if wrong or not layers:
        raise UnsupportedCacheError(
            f"{type(cache).__name__} holds {', '.join(wrong) or 'no rows'}; rows can be evicted "
            "from DynamicLayer alone. Use a DynamicCache on the device."
        )
    stays = [_staying(layer, columns) for layer in layers]
    if any(rows.numel() == 0 for rows in stays):
        raise OptionError(
            f"evicting {columns.numel()} columns would leave no row in a layer. Keep at least one "
            "that every layer holds, such as the first token."
        )
    return max(_keep(layer, rows) for layer, rows in zip(layers, stays, strict=True))


def _staying(layer: Any, columns: Tensor) -> Tensor:
    """Rows of a layer that are kept, int64 (rows,); raises if samples differ."""
    held, real = held_columns(layer), row_map_of(layer).mask()
    if real is not None or not bool((held == held[:1]).all()):
        raise UnsupportedCacheError(
            f"the {len(held)} samples of this cache hold different rows, so a column is not one "
            "row of all of them. Evict from caches of one sample, or of equal ones."
        )
    return (~torch.isin(held[0], columns.to(held.device))).nonzero()[:, 0]


def _keep(layer: Any, rows: Tensor) -> int:
    """Keep only these rows of a layer; returns how many were evicted."""
    before = row_map_of(layer)
    evicted = before.rows - rows.numel()
    if evicted:
        kept = before.keep_rows(rows, layer.keys.shape[0])
        layer.keys, layer.values = layer.keys[..., rows, :], layer.values[..., rows, :]
        compress_layer(layer, kept, False)
    return evicted


class Mark:
    """A snapshot of a cache. Before `rewind`, rows may only be added, not evicted.

    Layers that hold all rows are cut to their earlier length. All others (recurrent states, sliding
    windows) are copied: for a hybrid decoder a mark costs its states, not its rows.
    """

    def __init__(self, cache: Any) -> None:
        self._cache = cache
        self._layers = [
            _Rows(x) if type(x) in WHOLE and x.is_initialized else copy.deepcopy(x)
            for x in cache.layers
        ]

    def rewind(self) -> None:
        """Restore the cache; to be called once."""
        layers = self._cache.layers
        del layers[len(self._layers) :]  # a cache without a config adds layers as they are written
        for i, saved in enumerate(self._layers):
            if isinstance(saved, _Rows):
                saved.restore(layers[i])
            else:
                layers[i] = saved


class _Rows:
    """The attributes of a layer without its rows: a second copy of these would use memory."""

    def __init__(self, layer: Any) -> None:
        self.kind, self.rows = type(layer), physical_length(layer)
        self.rest = {k: v for k, v in vars(layer).items() if k not in ("keys", "values")}

    def restore(self, layer: Any) -> None:
        """Cut `layer` to its earlier rows, and restore its class and attributes."""
        keys, values = (t[..., : self.rows, :] for t in (layer.keys, layer.values))
        layer.__class__ = self.kind
        vars(layer).clear()
        vars(layer).update(self.rest, keys=keys, values=values)
