"""Calls of decoder layers behind a stage: the rows, tables and masks of their segment."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor

from tokencomp.engine.layer_types.registry import CONVOLUTION, LayerType
from tokencomp.engine.rows.arguments import (
    SET_APART,
    gather_arguments,
    sequence_dim,
    sequence_lengths,
    table_parts,
    text_positions,
)
from tokencomp.engine.rows.compaction import take
from tokencomp.engine.stage.forward import ForwardPass
from tokencomp.engine.stage.segments import Segment
from tokencomp.tokens.signals import Attention
from tokencomp.torchlib import compat

# Arguments that `_positions`, `_tables` and the masks of a segment provide.
APART = {"hidden_states", "position_embeddings", *SET_APART} - {"input_ids"}


def before_layer(
    forward: ForwardPass, i: int, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Arguments of layer `i`, with rows, rotary tables and mask of its segment.

    Returns
    -------
    tuple of args and kwargs, or None
        None in the first segment, for which the decoder itself prepares them.
    """
    segment = forward.segment_of(i)
    if segment.first == 0:
        return None
    if len(args) > 1:
        args, kwargs = args[:1], compat.bind(forward.adapter.layers[i], args, kwargs)
        kwargs.pop("hidden_states", None)
    kwargs = dict(kwargs)
    hidden = args[0] if args else kwargs["hidden_states"]
    if not segment.ready:
        hidden = _enter(forward, segment, hidden, kwargs)
    layer_type, cache = forward.layer_types.types[i], compat.get_cache(kwargs)
    kwargs.update(_column_arguments(segment, kwargs, forward.segments[0].layout.width))
    kwargs["attention_mask"] = _mask(forward, segment, layer_type, hidden, cache)
    if "conv_mask" in kwargs:
        kwargs["conv_mask"] = _mask(forward, segment, CONVOLUTION, hidden, cache)
    kwargs["position_ids"] = _positions(forward, segment, kwargs)
    kwargs.update(segment.lengths)
    if "position_embeddings" in kwargs:
        kwargs["position_embeddings"] = _tables(segment, layer_type.name, kwargs, hidden.device)
    if args:
        return (hidden,), kwargs
    kwargs["hidden_states"] = hidden
    return args, kwargs


def _enter(
    forward: ForwardPass, segment: Segment, hidden: Tensor, kwargs: dict[str, Any]
) -> Tensor:
    """First layer of a segment: the stage, if there is one, then what its rows have in common."""
    previous = forward.segments[forward.segments.index(segment) - 1]
    segment.index = previous.index
    if segment.stage is not None:
        hidden = _run_stage(forward, segment, previous, hidden, kwargs)
    if forward.compresses:
        segment.layout = forward.layout
    if segment.layout.packed:
        segment.lengths = sequence_lengths(segment.layout, kwargs)
    if segment.layout.packed and compat.get_cache(kwargs) is None:
        # transformers distinguishes packed prompts by positions that start again, and only
        # where there is neither a mask nor a cache.
        segment.text_positions = text_positions(segment.layout, hidden.device)
    segment.ready = True
    return hidden


def _run_stage(
    forward: ForwardPass,
    segment: Segment,
    previous: Segment,
    hidden: Tensor,
    kwargs: dict[str, Any],
) -> Tensor:
    """Apply the stage before a segment to the hidden states (B, n, d) and its rotary tables."""
    stage: Any = segment.stage
    layer_type, device = forward.layer_types.types[segment.first].name, hidden.device
    tables = _tables(previous, layer_type, kwargs, device)
    scores = forward.scores
    for signal in stage.needs:
        if not isinstance(signal, Attention) or signal.layer != "next" or scores is None:
            continue
        if not scores.known(segment.first):  # else by a layer before, as this one has no attention
            cache, layout = compat.get_cache(kwargs), forward.layout
            ids = _positions(forward, previous, kwargs)
            with forward.timed():
                scores.of_input(segment.first, hidden, tables, ids, signal, layout, cache)
    index = previous.index
    if index is None:
        index = torch.arange(hidden.shape[1], device=device)[None]
    parts = table_parts(tables)
    dims = [1, 1, *map(sequence_dim, parts)]
    with forward.timed():
        hidden, segment.index, *parts = forward.reduce(stage, [hidden, index, *parts], dims)
    segment.tables[layer_type] = parts
    return hidden


def _positions(forward: ForwardPass, segment: Segment, kwargs: Mapping[str, Any]) -> Tensor | None:
    """The `position_ids` of layers of a segment.

    Layers that compute with positions themselves get the positions of the rows that are left. They
    read none where `rotary` is set, or where M-RoPE has rows of its own and the layers get the row
    that counts text tokens. Such layers get positions without gaps, because transformers reads a
    gap as the start of another packed prompt.
    """
    adapter, positions = forward.adapter, cast(Tensor | None, kwargs.get("position_ids"))
    reads = adapter.layers_read_positions and forward.rotary is None
    if positions is None or not reads or (adapter.mrope and positions.ndim < 3):
        return segment.text_positions
    if segment.index is None:
        return positions
    index = segment.index.to(positions.device)
    axes = positions.shape[:-2]  # M-RoPE has one row per axis in front of the samples
    positions = positions.expand(*axes, len(index), -1)
    return positions.gather(-1, index.expand(*axes, -1, -1))


def _mask(
    forward: ForwardPass, segment: Segment, layer_type: LayerType, hidden: Tensor, cache: Any
) -> Any:
    """The mask of the layers of one kind in a segment, made once for all of them."""
    if layer_type.name not in segment.masks:
        new = segment.layout.valid(hidden.device) if forward.compresses else forward.new
        source = forward.mask_source(new, cache)
        text = segment.text_positions
        segment.masks[layer_type.name] = layer_type.mask(source, segment, hidden, text)
    return segment.masks[layer_type.name]


def _column_arguments(segment: Segment, kwargs: Mapping[str, Any], width: int) -> dict[str, Any]:
    """Further arguments of a layer that have an entry for each column, such as per-layer inputs.

    Parameters
    ----------
    width
        Columns of the decoder call.
    """
    if segment.index is None:
        return {}
    others = {
        name: value
        for name, value in kwargs.items()
        if name not in APART and isinstance(value, Tensor) and value.ndim > 1
    }
    if others:
        valid = segment.layout.valid(segment.index.device)
        gather_arguments(others, segment.index, valid, width)
    return others


def _tables(
    segment: Segment, layer_type: str, kwargs: Mapping[str, Any], device: torch.device
) -> Any:
    """Rotary tables of a layer of `layer_type` that is called with `kwargs`, for rows of `segment`.

    Layer types may have tables of their own, and some have none.
    """
    tables = kwargs.get("position_embeddings")
    if tables is None or segment.index is None:
        return tables
    if not segment.tables.get(layer_type):
        parts = [t.to(device) for t in table_parts(tables)]
        index, valid = segment.index.to(device), segment.layout.valid(device)
        segment.tables[layer_type] = take(parts, index, [*map(sequence_dim, parts)], valid)
    moved = tuple(t.to(device) for t in segment.tables[layer_type])
    return moved if isinstance(tables, tuple) else moved[0]
