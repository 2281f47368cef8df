"""What a stage in the vision tower has kept of earlier pictures, for reducers that compare them.

A later turn finds it in the row map of the cache that holds the pictures. A cache that was cut into
them no longer has it: the next picture is then kept whole.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from tokencomp.adapters.base import Adapter
from tokencomp.adapters.towers.base import Cells, EncoderCall
from tokencomp.engine.cache import CompressedLayer, first_layer
from tokencomp.engine.call import Noted
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


def copies(memories: Memories, modality: Modality, samples: int) -> list[Memory]:
    """Memories of one kind of media to be written to; empty ones for another batch."""
    known = memories.get(modality, [])
    return [dict(m) for m in known] if len(known) == samples else [{} for _ in range(samples)]


def running_prompt(adapter: Adapter, noted: Noted) -> tuple[Tensor, Tensor | None, Any]:
    """Modalities (B, L) of the prompt that is being encoded, its ids, and its cache.

    `generate` encodes media before it calls the model, with the columns that its cache holds.
    """
    if noted.modalities is not None:
        inputs = noted.inputs or {}
        return noted.modalities, inputs.get("input_ids"), compat.get_cache(inputs)
    arguments = noted.arguments or {}
    modalities: Any = adapter.modalities(arguments)
    cache, ids = compat.get_cache(arguments), arguments.get("input_ids")
    held = 0 if cache is None else cache.get_seq_length()
    return modalities[:, held:], None if ids is None else ids[:, held:], cache


def memories_before(call: EncoderCall, cells: Cells) -> tuple[list[Memory], list[Memory]]:
    """Memories of all samples before a call of the tower, and of every part of its cells.

    Media are in the order of the batch; parts of a sample share its memory.
    """
    assert call.modalities is not None
    memories = copies(recalled(call.cache), cells.modality, len(call.modalities))
    ends = (call.modalities == CODES[cells.modality]).sum(1).cumsum(0)
    lengths = cells.tokens or [math.prod(grid) for part in cells.parts for grid in part]
    owners = np.searchsorted(ends[:-1].numpy(force=True), np.cumsum(lengths))
    return memories, [memories[b] for b in owners]
