"""The pass `restore`: expands the output to full length, and stores the map on the cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicSlidingWindowLayer

from tokencomp.engine.cache import CacheOwner, compress_layer, filled, first_layer
from tokencomp.engine.call import Call, Segment
from tokencomp.engine.checks import check_cache
from tokencomp.engine.rowmap import RowMap
from tokencomp.engine.tower.memory import Seen
from tokencomp.engine.weights import repeat_rows

# -- the cache ----------------------------------------------------------------------------------


def note_prompt(call: Call, cache: Any, owner: CacheOwner) -> Any:
    """Store the map of a prompt on the cache; returns the first layer with rows, or None.

    Rows of merged tokens are repeated first, see `tokencomp.engine.weights`.
    """
    if cache is not call.cache:
        check_cache(cache, bool(call.plan.layer_stages))
    starts, owner.types = call.first_columns(), call.layer_types
    first = first_layer(cache)
    if first is None or first.keys is None:  # checkpointed layers do not write to the cache
        return first
    for segment in call.segments:
        last = segment is call.segments[-1]  # a layer that runs twice has two cache layers
        layers = filled(cache.layers[segment.first : None if last else segment.stop])
        if layers:
            _note_segment(call, segment, layers, starts)
            for layer in layers:
                layer.owner = owner
    return first


def _note_segment(call: Call, segment: Segment, layers: list[Any], starts: Tensor | None) -> None:
    new, index, device = segment.new, None, layers[0].device
    batch = len(new.lengths)
    if new.weights is not None and call.merges:
        new, index = new.to(device).repeated(device)
        call.repeated[segment.first] = new.lengths
    row_map = segment.past.append(new, batch, device)
    row_map.starts = starts
    if call.seen is not None and segment.first == 0:
        row_map.seen = Seen(row_map.rows - _rows_after_media(segment.new), call.seen)
    if index is not None:
        for layer in layers:
            repeat_rows(layer, index, segment.past.rows)
    for layer in layers:
        rows = row_map if layer.device == device else row_map.to(layer.device)
        compress_layer(layer, rows, layer is layers[0] and segment.first > 0)


def _rows_after_media(rows: RowMap) -> int:
    """Rows of text after the last span of a prompt, in the sample that has fewest."""
    return min(rows.rows - spans[-1].stop for spans in rows.spans if spans)


def note_turn(call: Call, cache: Any) -> None:
    """Store which rows of the cache are real, if later tokens had padding.

    Cache layers would take it for real rows.
    """
    if cache is None or call.segments[0].new.mask() is None:
        return
    for segment in call.segments:
        for layer in filled(cache.layers[segment.first : segment.stop]):
            layer.note_padding(segment.mask(layer.device))


# -- the output ---------------------------------------------------------------------------------


def restore(x: Tensor, rows: RowMap, width: int) -> Tensor:
    """Expand rows of x (B, rows, d) to the columns of the caller's batch, (B, width, d).

    A dropped column repeats the last row before it, which predicts what follows: a label right
    after a dropped token still trains. Columns without an earlier row are zero.
    """
    if rows.columns is None:
        return x
    columns, full = torch.arange(width, device=x.device), []
    for b, length in enumerate(rows.lengths):
        # Number of kept columns up to each column; row 0 of `padded` is zero.
        held = rows.columns[b, rows.rows - length :].to(x.device)
        before = torch.searchsorted(held, columns, right=True)
        padded = nn.functional.pad(x[b, rows.rows - length :], (0, 0, 1, 0))
        full.append(padded[before])
    return torch.stack(full)


def restore_states(out: Any, segments: Sequence[Segment], width: int, keep_last_state: bool) -> Any:
    """Expand the hidden states of a decoder's output to `width` columns; in place if no tuple.

    `keep_last_state` leaves the last state short: only logits of the text at the end are needed.
    """
    states = getattr(out, "hidden_states", None)
    if states is not None:
        out.hidden_states = _full_states(states, segments, width)
    if keep_last_state:
        return out
    rows = segments[-1].new
    if isinstance(out, tuple):
        return (restore(out[0], rows, width), *out[1:])
    last = out.last_hidden_state
    out.last_hidden_state = restore(last, rows, width)
    if states is not None and states[-1] is last:  # the same tensor, for gradients
        out.hidden_states = (*out.hidden_states[:-1], out.last_hidden_state)
    return out


def _full_states(states: Sequence[Any], segments: Sequence[Segment], width: int) -> tuple[Any, ...]:
    """Expand the input of the first layer, then the output of every layer."""
    maps = [s.new for s in segments for _ in range(s.first, s.stop)]
    pairs = zip(states, [maps[0], *maps[: len(states) - 1]], strict=True)
    return tuple(s if s is None else _full_state(s, rows, width) for s, rows in pairs)


def _full_state(x: Tensor, rows: RowMap, width: int) -> Tensor:
    """`restore`, also for S streams of hidden states: (S, B, n, d) or (B, n, S, d)."""
    if rows.columns is None or x.ndim == 3:
        return restore(x, rows, width)
    if x.shape[:2] != (len(rows.lengths), rows.rows):
        return torch.stack([restore(stream, rows, width) for stream in x])
    whole: Tensor = restore(x.flatten(2), rows, width).unflatten(2, x.shape[2:])
    return whole


def restore_map(weights: Tensor, segment: Segment, width: int) -> Tensor:
    """Expand an attention map (B, H, rows of this call, all rows) to (B, H, width, all columns).

    A dropped key has weight 0. A dropped query repeats the last row before it, as in `restore`.
    """
    batch, heads, queries, _ = weights.shape
    columns = segment.columns(batch, weights.device)
    if columns is None:
        return weights
    # A static cache ends in unwritten rows; a sliding layer holds only the last rows.
    held = min(weights.shape[-1], columns.shape[1])
    weights, columns = weights[..., :held], columns[:, -held:]
    # Padding rows can share a column with other rows; their weights are 0.
    full = weights.new_zeros(batch, heads, queries, segment.past.length + width)
    full = full.scatter_add(-1, columns[:, None, None].expand_as(weights), weights)
    rows = restore(full.transpose(1, 2).flatten(2), segment.new, width)
    split: Tensor = rows.unflatten(2, (heads, -1))
    return split.transpose(1, 2)


def restore_maps(maps: Any, call: Call, layers: Sequence[Any]) -> Any:
    """Expand the attention maps of all decoder layers; some can be None.

    `layers`: layers of the KV cache. Maps of sliding layers begin with the columns that their cache
    layer holds, as without a patch.
    """
    width, layer_types, full = call.width, call.layer_types, []
    cut = any(isinstance(layer, DynamicSlidingWindowLayer) for layer in layers)
    for i, weights in enumerate(maps):
        segment = call.segment_of[i]
        size = layer_types.sizes.get(layer_types.types[i].name) if cut else None
        if weights is not None:
            weights = restore_map(weights, segment, width)
        if weights is not None and size is not None:
            weights = weights[..., -(min(segment.past.length, size - 1) + width) :]
        full.append(weights)
    return tuple(full)


def whole_output(out: Any, earlier: list[Tensor]) -> Any:
    """The output of the last chunk, with the hidden states of earlier chunks before it."""
    if not earlier:
        return out
    if isinstance(out, tuple):
        return (torch.cat([*earlier, out[0]], dim=1), *out[1:])
    out.last_hidden_state = torch.cat([*earlier, out.last_hidden_state], dim=1)
    return out
