"""What transformers reads of a compressed cache, compared with what the engine wrote.

A prompt of eight columns, three of them dropped, then three more tokens:

    asked of the cache                        answer            compared with
    get_seq_length()                          8                 columns so far
    rows of an attention layer                5                 `RowMap.rows`
    get_mask_sizes(3, layer)                  (5 + 3, 3)        sum: columns and the new tokens
    get_query_offset(layer)                   8                 columns
    width of the 2-D mask of a call           11                columns and the new tokens

A release of transformers that counts otherwise would answer a later turn from wrong positions. The
comparison makes it a `CacheError` in the first call that it would reach. It reads a few numbers per
layer after a prompt and before a turn. A decode step compares one number, and only where layer 0
has no rows: elsewhere the first layer is the one that tells the length. Positions are not compared:
transformers computes them from this length, or the caller gives any.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import transformers
from torch import Tensor

from tokencomp.engine.cache import CompressedLayer, CompressedStaticLayer
from tokencomp.errors import CacheError


def check_prompt(cache: Any, columns: int) -> None:
    """Compare rows and lengths of the cache after a compressed prompt that ends at `columns`."""
    for layer in cache.layers:
        if isinstance(layer, CompressedLayer):
            _compare(layer, "rows", layer.rows, layer.row_map.rows)
            if isinstance(layer, CompressedStaticLayer):
                break  # the device is read once
    _check_lengths(cache, columns, 1)


def check_turn(cache: Any, first: Any, arguments: Mapping[str, Any]) -> None:
    """Compare lengths and mask before the decoder reads later tokens.

    Parameters
    ----------
    first
        The first layer with rows.
    arguments
        Of the decoder; `inputs_embeds` is (B, n, d).
    """
    new = arguments["inputs_embeds"].shape[1]
    if new == 1 and cache.layers[0] is first:
        return
    columns = first.get_seq_length()
    if new == 1:
        counted = cache.get_seq_length()
        # A number on a device is not read: a decode step must not wait for it.
        if not _on_device(counted) and not _on_device(columns):
            _compare(cache.layers[0], "columns", counted, columns)
        return
    columns = int(columns)
    _check_lengths(cache, columns, new)
    mask = arguments.get("attention_mask")
    if isinstance(first, CompressedStaticLayer) or not isinstance(mask, Tensor) or mask.ndim != 2:
        return
    _compare(first, "columns of the mask", mask.shape[1], columns + new)


def _check_lengths(cache: Any, columns: int, new: int) -> None:
    """Compare what the helpers of masks and positions will read before `new` tokens."""
    _compare(cache.layers[0], "columns", cache.get_seq_length(), columns)
    offset = getattr(cache, "get_query_offset", cache.get_seq_length)  # new in 5.24
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, CompressedLayer) and not isinstance(layer, CompressedStaticLayer):
            _compare(layer, "columns", layer.get_seq_length(), columns)
            _compare(
                layer, "columns of the mask", sum(cache.get_mask_sizes(new, index)), columns + new
            )
            _compare(layer, "offset of the queries", offset(index), columns)


def _on_device(number: Any) -> bool:
    return isinstance(number, Tensor) and number.device.type != "cpu"


def _compare(layer: Any, what: str, found: Any, wanted: Any) -> None:
    if int(found) != int(wanted):
        kind = getattr(layer, "plain", type(layer)).__name__
        raise CacheError(
            f"{kind} of transformers {transformers.__version__} says {int(found):,} {what}, the "
            f"compressed prompt {int(wanted):,}. Later tokens would get wrong positions or masks. "
            "Start the conversation again, run it uncompressed (handle.disabled()), or install a "
            "release of transformers that docs/support.md names."
        )
