"""Eviction: rows leave a KV cache for good, and those that stay keep their positions.

The rows that are left hold what they held, so nothing is computed again. A later token attends to
them as if its mask hid the columns that have left. The oracle is therefore a *staircase mask*: in a
run of full length, tokens behind the eviction do not see the evicted columns, tokens before it do.

    token  0  1  2  3  4  5        columns 1 and 2 leave behind token 3
      3    x  x  x  x
      4    x        x  x
      5    x        x  x  x
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokencomp.adapters.base import Adapter
from tokencomp.engine.cache.compress import compress_layer
from tokencomp.engine.cache.layers import WHOLE, CompressedLayer
from tokencomp.engine.cache.rows import HOLDS_ROWS, filled, physical_length
from tokencomp.engine.layer_types.registry import Indexed
from tokencomp.engine.layer_types.types import LayerTypes
from tokencomp.engine.rows.outputs import cached_columns
from tokencomp.errors import OptionError, UnsupportedCacheError, UnsupportedModelError
from tokencomp.torchlib.cache_classes import STATES


def held_columns(layer: Any) -> Tensor:
    """Column of the uncompressed sequence of every row that a cache layer holds.

    Returns
    -------
    Tensor of int64, shape (B, rows)
        Ascending.
    """
    keys, rows = layer.keys, physical_length(layer)
    columns, dropped = getattr(layer, "columns", None), getattr(layer, "dropped", 0)
    return cached_columns(columns, rows, dropped, keys.shape[0], keys.device)


def check_eviction(adapter: Adapter) -> None:
    """Refuse decoders whose later tokens would differ from those under a staircase mask.

    Raises
    ------
    UnsupportedModelError
        A layer keeps a state, a window of rows, or an indexer, or attention depends on the number
        or the distance of rows.
    """
    layer_types = LayerTypes.of(adapter.decoder)
    reasons = {
        "layers of linear attention or convolution, whose state cannot forget a token": (
            layer_types.linear
        ),
        "layers with an attention window, whose cache has let rows go already": bool(
            layer_types.sizes or layer_types.cut or layer_types.cut_later_turns
        ),
        "layers with an indexer, which holds rows of its own": any(
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
    """Let the rows of some columns leave every layer of a cache, in place.

    Layers that hold no row of a column, because it was dropped before, stay as they are there.
    Call `check_eviction` first: a cache does not show what its decoder does.

    Parameters
    ----------
    cache
        A `DynamicCache`, compressed or not, of one or several equal samples.
    columns : Tensor of int64, shape (n,)
        Of the uncompressed sequence, over all calls.

    Returns
    -------
    int
        Rows that left the layer that lost most.

    Raises
    ------
    UnsupportedCacheError
        Layers of another kind, or samples that hold different rows. Nothing has left then.
    OptionError
        A layer would be empty. Nothing has left then.
    """
    every = getattr(cache, "layers", ())
    layers = filled(every)
    rows_or_states = [x for x in every if isinstance(x, (HOLDS_ROWS, STATES))]
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
    """Rows of a layer that stay, int64 (rows,); raises where samples differ."""
    held = held_columns(layer)
    if getattr(layer, "valid", None) is not None or not bool((held == held[:1]).all()):
        raise UnsupportedCacheError(
            f"the {len(held)} samples of this cache hold different rows, so a column is not one "
            "row of all of them. Evict from caches of one sample, or of equal ones."
        )
    return (~torch.isin(held[0], columns.to(held.device))).nonzero()[:, 0]


def _keep(layer: Any, rows: Tensor) -> int:
    """Keep these rows of a layer; returns how many have left."""
    before, held = physical_length(layer), held_columns(layer)
    if rows.numel() == before:
        return 0
    plain = not isinstance(layer, CompressedLayer)
    layer.keys, layer.values = layer.keys[..., rows, :], layer.values[..., rows, :]
    left = before - rows.numel()
    compress_layer(layer, left, None, False, held[:, rows])
    if plain:
        layer.owner = None
    return left
