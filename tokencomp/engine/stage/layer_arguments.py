"""Arguments of decoder layers behind a stage, for the rows that their segment has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tokencomp.engine.rows.arguments import SET_APART, gather_arguments
from tokencomp.engine.rows.compaction import take
from tokencomp.engine.stage.segments import Segment
from tokencomp.torchlib import compat

# Arguments that `layer_positions`, `layer_tables` and the masks of a segment provide.
APART = {"hidden_states", "position_embeddings", *SET_APART} - {"input_ids"}


def column_arguments(segment: Segment, kwargs: Mapping[str, Any], width: int) -> dict[str, Any]:
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


def layer_positions(segment: Segment, kwargs: Mapping[str, Any], read: bool) -> Tensor | None:
    """The `position_ids` of layers of a segment.

    Layers that compute with positions themselves get the positions of the rows that are left.
    Other layers get positions without gaps, because transformers reads a gap as the start of
    another packed prompt.

    Parameters
    ----------
    read
        Whether the layers read `position_ids`, which then are the true positions.
    """
    positions: Tensor | None = kwargs.get("position_ids")
    if not read or positions is None:
        return segment.text_positions
    if segment.index is None:
        return positions
    index = segment.index.to(positions.device)
    axes = positions.shape[:-2]  # M-RoPE has one row per axis in front of the samples
    positions = positions.expand(*axes, len(index), -1)
    return positions.gather(-1, index.expand(*axes, -1, -1))


def layer_tables(
    segment: Segment, kind: str, kwargs: Mapping[str, Any], device: torch.device
) -> Any:
    """Rotary tables of a layer of `kind` that is called with `kwargs`, for rows of `segment`.

    Kinds of layers may have tables of their own, and some have none.
    """
    tables = kwargs.get("position_embeddings")
    if tables is None or segment.index is None:
        return tables
    if not segment.tables.get(kind):
        parts = [t.to(device) for t in table_parts(tables)]
        index, valid = segment.index.to(device), segment.layout.valid(device)
        segment.tables[kind] = take(parts, index, [*map(compat.sequence_dim, parts)], valid)
    moved = tuple(t.to(device) for t in segment.tables[kind])
    return moved if isinstance(tables, tuple) else moved[0]


def table_parts(tables: Any) -> list[Tensor]:
    """The tensors of rotary tables: cosine and sine, one complex tensor, or none."""
    if tables is None:
        return []
    return list(tables) if isinstance(tables, tuple) else [tables]
