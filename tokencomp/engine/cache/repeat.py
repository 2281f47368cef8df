"""Rows of merged tokens stand in the cache as often as the tokens that they stand for.

A key that weighs n times as much in the softmax equals n equal keys. While a prompt is read,
attention gets the weights. Later tokens find the rows repeated, each in the column that was kept:

    tokens of the prompt    0  1  2  3  4  5  6  7
    rows that attention had 0  1        4     6  7     weights 1, 4, 1, 1, 1
    rows in the cache       0  1  1  1  1  4  6  7

So a decode step needs no weights, runs no call of ours, and reads as many rows as without a patch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import StaticLayer

from tokencomp.engine.cache.rows import keeps_window, physical_length, stored
from tokencomp.engine.rows.layout import RowLayout
from tokencomp.engine.stage.segments import Segment
from tokencomp.errors import UnsupportedCacheError
from tokencomp.torchlib.cache_classes import QUANTIZED


def repeated(segment: Segment, sizes: Tensor) -> tuple[Segment, Tensor]:
    """A segment whose new rows are repeated, and the row that every new one repeats.

    `sizes` (B, width) are the tokens that every column of the layout stands for. The new layout has
    no spans. Rows are columns of the layout before, (B, repeated width), and -1 at padding.
    """
    layout, valid = segment.layout, segment.layout.valid(sizes.device)
    counts = sizes.round().long()
    counts = counts if valid is None else counts * valid
    ends = counts.cumsum(1)
    lengths = ends[:, -1].tolist()
    width = max(lengths)
    slots = torch.arange(width, device=ends.device) - (width - ends[:, -1:])
    index = torch.searchsorted(ends, slots, right=True)
    origin = None if layout.origin is None else layout.origin.gather(1, index)
    after = RowLayout(width, lengths, [], origin)
    return replace(segment, layout=after), index.masked_fill(slots < 0, -1)


def repeat_rows(layer: Any, index: Tensor, before: int) -> None:
    """Repeat the rows that a prefill has written to a cache layer behind the first `before`.

    `index` (B, n) is that of `repeated`; 0 is the first row of the prefill.
    """
    index = index.to(layer.device)
    if hasattr(layer, "prefill_keys"):
        _repeat_for_good(layer, index, before)
        return
    if keeps_window(layer):
        _repeat_in_window(layer, index, before)
        return
    if isinstance(layer, StaticLayer):
        _repeat_in_place(layer, index, before)
        return
    rows = _behind((stored(layer, "keys"), stored(layer, "values")), index, before)
    if isinstance(layer, QUANTIZED):
        layer.is_initialized, layer.cumulative_length = False, 0
        layer.update(*rows)  # as the prompt was written
        return
    layer.keys, layer.values = rows


def _behind(pair: Sequence[Tensor], index: Tensor, before: int) -> list[Tensor]:
    """The first rows of keys and values, then rows `index` of those behind them."""
    if not before:
        return _taken(pair, index)
    new = _taken([x[..., before:, :] for x in pair], index)
    return [torch.cat([x[..., :before, :], n], dim=-2) for x, n in zip(pair, new, strict=True)]


def _taken(pair: Sequence[Tensor], index: Tensor) -> list[Tensor]:
    """Rows `index` (B, n) of keys and values (B, heads, rows, d); zeros where it is negative."""
    from tokencomp.kernels import gather_rows

    rows: list[Tensor] = gather_rows(pair, index, 2, 0, trusted=True)
    return rows


def _repeat_in_place(layer: Any, index: Tensor, before: int) -> None:
    """Repeat rows of a layer of constant length, whose memory stays where it is."""
    held, rows = physical_length(layer), before + index.shape[1]
    if rows > layer.max_cache_len:
        raise UnsupportedCacheError(
            f"merge=True repeats merged rows in the cache, so that it has {rows} rows, and this "
            f"static cache can hold {layer.max_cache_len}. Give it room for every token of the "
            "prompt, or use merge=False."
        )
    pair = layer.keys, layer.values
    for x, new in zip(pair, _taken([x[..., before:held, :] for x in pair], index), strict=True):
        x[..., before:rows, :] = new
    layer.cumulative_length += rows - held


def _repeat_for_good(layer: Any, index: Tensor, before: int) -> None:
    """Repeat rows of a layer that keeps those of the prompt apart from later ones."""
    pair = layer.prefill_keys, layer.prefill_values
    layer.prefill_keys, layer.prefill_values = _behind(pair, index, before)
    layer.prefill_cumulative_length = before + index.shape[1]
    layer.prefill_length = max(layer.prefill_length, layer.prefill_cumulative_length)


def _repeat_in_window(layer: Any, index: Tensor, before: int) -> None:
    """Repeat rows of a layer that holds the last of them alone, and widen its window for that.

    The layer counts rows, and a query sees columns. A repeated row has the column of a kept token,
    so that its number can be larger by as many as its sample has repetitions. The window grows by
    the largest number of repetitions of any sample, and then a row that the layer drops is one that
    no later query sees, as before. This follows from each sample alone: the width of the batch does
    not grow where its longest sample repeats nothing.
    """
    dropped = layer.cumulative_length - layer.keys.shape[-2]
    repetitions = (index[:, 1:] == index[:, :-1]) & (index[:, 1:] >= 0)
    more = int(repetitions.sum(1).max())
    past = torch.arange(before, device=index.device).expand(len(index), -1)
    rows = torch.cat([past, torch.where(index < 0, index, index + before)], dim=1)
    layer.sliding_window += more
    layer.widened = getattr(layer, "widened", 0) + more
    layer.cumulative_length = rows.shape[1]
    rows = rows[:, max(rows.shape[1] - layer.sliding_window + 1, 0) :] - dropped
    layer.keys, layer.values = _taken((layer.keys, layer.values), rows)
