"""What a stage in the vision tower has kept of earlier pictures, for reducers that compare them.

A later turn finds it in the row map of the cache that holds the pictures. A cache that was cut into
them no longer has it: the next picture is then kept whole. When a session evicts rows, it stores
again what the other rows hold.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokencomp.adapters.base import Adapter
from tokencomp.engine.cache import CompressedLayer, first_layer
from tokencomp.engine.call import Noted
from tokencomp.errors import SpanError
from tokencomp.tokens.tokens import CODES, Memories, Memory, Modality
from tokencomp.torchlib import compat


@dataclass(frozen=True)
class Seen:
    """What was kept last of the pictures in the first `rows` rows of a cache."""

    rows: int
    memories: Memories


TILE = "tile"  # first part of the keys of tiles in a memory


def recalled(cache: Any) -> Memories:
    """The memories that go with a cache."""
    layer = first_layer(cache)
    seen: Seen | None = layer.row_map.seen if isinstance(layer, CompressedLayer) else None
    return {} if seen is None else seen.memories


def store_without(
    cache: Any, memories: Memories, lost: Iterable[tuple[Modality, tuple[int, int], Tensor]]
) -> None:
    """Store memories of one sample with the rows that its cache holds, without lost cells.

    `lost` has, for pictures of (h, w) cells of one kind, the raster numbers of cells whose last row
    was evicted, int64 (cells,). It does not tell tiles of a picture apart, so that tiles with keys
    (`Cells.keys`) are forgotten.
    """
    memories = {modality: copies(memories, modality, 1) for modality in memories}
    for kept in memories.values():
        kept[:] = [{k: v for k, v in memory.items() if k[0] != TILE} for memory in kept]
    for modality, size, cells in lost:
        for memory in memories.get(modality, []):
            if size in memory:
                cells = cells.to(memory[size].device)
                memory[size] = memory[size].index_fill(0, cells, torch.nan)
    layer = first_layer(cache)
    layer.row_map = replace(layer.row_map, seen=Seen(layer.rows, memories))


def copies(memories: Memories, modality: Modality, samples: int) -> list[Memory]:
    """Memories of one kind of media to be written to; empty ones for another batch."""
    known = memories.get(modality, [])
    return [dict(m) for m in known] if len(known) == samples else [{} for _ in range(samples)]


def running_prompt(adapter: Adapter, noted: Noted) -> tuple[Tensor, Tensor | None, Any]:
    """Kinds (B, L) of the media of the prompt that is being encoded, its ids, and its cache.

    `generate` encodes media before it calls the model, with the columns that its cache holds.

    Raises
    ------
    SpanError
        The vision tower was called for no prompt.
    """
    if noted.modalities is not None:
        inputs = noted.inputs or {}
        return noted.modalities, inputs.get("input_ids"), compat.get_cache(inputs)
    arguments = noted.arguments or {}
    modalities = adapter.modalities(arguments) if arguments else None
    if modalities is None:
        raise SpanError(
            "the vision tower was called for no prompt, so it is not known which pictures the "
            "model has seen before. Pass pixels to the model or to generate, or take a reducer "
            "that looks at single pictures, such as 'pixelprune'."
        )
    cache, ids = compat.get_cache(arguments), arguments.get("input_ids")
    held = 0 if cache is None else cache.get_seq_length()
    return modalities[:, held:], None if ids is None else ids[:, held:], cache


def owners(modalities: Tensor, modality: Modality, lengths: list[int]) -> list[int]:
    """Sample of every medium of `lengths` tokens; media are in the order of the batch.

    Raises
    ------
    SpanError
        The prompts have another number of tokens.
    """
    ends = (modalities == CODES[modality]).sum(1).cumsum(0).tolist()
    stops = np.cumsum(lengths)
    if ends[-1] != stops[-1]:
        raise SpanError(
            f"{stops[-1]} tokens of {modality}s were encoded for prompts with {ends[-1]}, so it is "
            "not known whose they are. Pass pixels and prompts of one call of the processor."
        )
    found: list[int] = np.searchsorted(ends, stops).tolist()
    return found
