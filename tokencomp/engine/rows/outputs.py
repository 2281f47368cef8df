"""Outputs of full length: rows and attention maps spread over the columns of the caller's batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicSlidingWindowLayer

from tokencomp.engine.rows.layout import RowLayout


def restore(x: Tensor, layout: RowLayout, width: int) -> Tensor:
    """Spread rows of x over the columns of the caller's batch.

    A dropped column repeats the last row before it: what follows was predicted from that row,
    so a label right behind a dropped token still trains. Columns without a row before them are
    zeros. (B, layout.width, d) becomes (B, width, d).
    """
    if layout.origin is None:
        return x
    columns, rows = torch.arange(width, device=x.device), []
    for b, length in enumerate(layout.lengths):
        origin = layout.origin[b, layout.width - length :].to(x.device)
        before = torch.searchsorted(origin, columns, right=True)
        own = nn.functional.pad(x[b, layout.width - length :], (0, 0, 1, 0))
        rows.append(own[before])
    return torch.stack(rows)


def restore_states(out: Any, segments: Sequence[Any], width: int, keep_last_state: bool) -> Any:
    """Give the hidden states of a decoder's output full length, in place where it is no tuple.

    The segments are those of the decoder layers, and the caller's batch has `width` columns. With
    `keep_last_state` the last state stays as it is, because only text after the last span is read
    from it.
    """
    states = getattr(out, "hidden_states", None)
    if states is not None:
        out.hidden_states = _full_states(states, segments, width)
    if keep_last_state:
        return out
    layout = segments[-1].layout
    if isinstance(out, tuple):
        return (restore(out[0], layout, width), *out[1:])
    last = out.last_hidden_state
    out.last_hidden_state = restore(last, layout, width)
    if states is not None and states[-1] is last:  # one tensor, so that both carry gradients
        out.hidden_states = (*out.hidden_states[:-1], out.last_hidden_state)
    return out


def _full_states(states: Sequence[Any], segments: Sequence[Any], width: int) -> tuple[Any, ...]:
    """`restore` for the input of the first layer, then what each layer returns."""
    layouts = [s.layout for s in segments for _ in range(s.first, s.stop)]
    pairs = zip(states, [layouts[0], *layouts[: len(states) - 1]], strict=True)
    return tuple(s if s is None else _full_state(s, layout, width) for s, layout in pairs)


def _full_state(x: Tensor, layout: RowLayout, width: int) -> Tensor:
    """`restore`, also for S streams of hidden states: (S, B, n, d) or (B, n, S, d)."""
    layout = layout.to(x.device)
    if layout.origin is None or x.ndim == 3:
        return restore(x, layout, width)
    if x.shape[:2] != (len(layout.lengths), layout.width):
        return torch.stack([restore(stream, layout, width) for stream in x])
    whole: Tensor = restore(x.flatten(2), layout, width).unflatten(2, x.shape[2:])
    return whole


def restore_map(weights: Tensor, segment: Any, width: int) -> Tensor:
    """Spread an attention map over the columns of the caller's batch.

    A dropped key has weight 0. A dropped query repeats the last row before it, as `restore` does
    with hidden states. (B, H, rows of this call, rows of all calls) becomes (B, H, width, columns
    of all calls).
    """
    batch, heads, queries, _ = weights.shape
    columns = segment.columns(batch, weights.device)
    if columns is None:
        return weights
    # A static cache ends in unwritten rows, and one with a window has let the first rows go.
    held = min(weights.shape[-1], columns.shape[1])
    weights, columns = weights[..., :held], columns[:, -held:]
    # Several padding rows may name one column; their weights are 0, so they add nothing.
    full = weights.new_zeros(batch, heads, queries, segment.logical + width)
    full = full.scatter_add(-1, columns[:, None, None].expand_as(weights), weights)
    rows = restore(full.transpose(1, 2).flatten(2), segment.layout, width)
    split: Tensor = rows.unflatten(2, (heads, -1))
    return split.transpose(1, 2)


def restore_maps(maps: Any, forward: Any, layers: Sequence[Any]) -> Any:
    """`restore_map` for the attention maps of all decoder layers; a layer may have None.

    `layers` are those of the KV cache. One with a window holds the last columns of earlier calls
    alone, and maps of its layers begin with these, as without a patch.
    """
    width, layer_types, full = forward.width, forward.layer_types, []
    cut = any(isinstance(layer, DynamicSlidingWindowLayer) for layer in layers)
    for i, weights in enumerate(maps):
        segment = forward.segment_of(i)
        size = layer_types.sizes.get(layer_types.types[i].name) if cut else None
        if weights is not None:
            weights = restore_map(weights, segment, width)
        if weights is not None and size is not None:
            weights = weights[..., -(min(segment.logical, size - 1) + width) :]
        full.append(weights)
    return tuple(full)


def cached_columns(
    columns: Tensor | None, rows: int, dropped: int, batch: int, device: torch.device
) -> Tensor:
    """Column of every row that a cache layer holds, shape (B, rows).

    Parameters
    ----------
    columns : Tensor of int64, shape (B, m), m ≤ rows, or None
        Of the first rows, see `CompressedLayer.columns`.
    rows, dropped
        Rows that the layer holds, and columns that it does not.
    """
    if columns is None:
        return torch.arange(rows, device=device).expand(batch, -1)
    later = torch.arange(columns.shape[1], rows, device=device) + dropped
    return torch.cat([columns.to(device), later.expand(batch, -1)], dim=1)
