"""Compressed cache layers of less common classes.

Static layers have a constant length, for compiled decoding. Hybrid layers also hold states of short
convolutions. Reference layers (Unlimited-OCR) keep all rows of the prompt and a window of later
rows; their class is defined by the model's code, so its compressed class is created on first use.
"""

from __future__ import annotations

import functools
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.cache_utils import StaticLayer

from tokencomp.engine.cache import (
    CompressedDynamicLayer,
    CompressedIndexedLayer,
    CompressedLayer,
    CompressedSlidingLayer,
    is_reference,
)
from tokencomp.engine.rowmap import RowMap
from tokencomp.torchlib.cache_classes import HYBRID, HYBRID_SLIDING


class CompressedHybridLayer(CompressedDynamicLayer, HYBRID):  # type: ignore[misc]  # of type Any
    """Full attention and a state, which is that after the last row."""

    plain: ClassVar[type] = HYBRID


class CompressedHybridSlidingLayer(CompressedSlidingLayer, HYBRID_SLIDING):  # type: ignore[misc]  # older releases lack it
    """Windowed attention and a state, which is that after the last row."""

    plain = HYBRID_SLIDING


class CompressedReferenceLayer(CompressedDynamicLayer):
    """Mixin of compressed reference layers.

    Attributes
    ----------
    prefill_length : int
        Number of prompt rows to keep, if known before they are written.
    prefill_cumulative_length, cumulative_length : int
        Prompt rows written, and rows written after them.
    """

    prefill_length: int
    prefill_cumulative_length: int
    cumulative_length: int

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Rows that a write of `query_length` returns, and entry of the first in the 2-D mask."""
        self.check_patch()
        plain: Any = self.plain
        rows, evicted = plain.get_mask_sizes(self, query_length)
        return rows, evicted + self.row_map.dropped

    def shorten_prompt(self, dropped: int) -> None:
        """Correct the prompt length that `generate` sets before the prefill.

        If it is not set, the first call sets it to the rows that it writes.
        """
        if self.prefill_length > self.prefill_cumulative_length:
            self.prefill_length -= dropped

    def _cut(self, rows: int) -> None:
        plain: Any = self.plain
        plain.crop(self, rows - self.rows)


@functools.cache
def compressed_reference(plain: type) -> type:
    """The compressed class of a reference class."""
    name, kind = f"Compressed{plain.__name__}", vars(plain)["_layer_type"]
    # transformers registers subclasses defined with `_layer_type` for all new caches, so the type
    # is set afterwards.
    members = {"plain": plain, "_layer_type": None}
    compressed: Any = type(name, (CompressedReferenceLayer, plain), members)
    compressed._layer_type = kind
    return compressed  # type: ignore[no-any-return]  # a class


class CompressedStaticLayer(CompressedLayer, StaticLayer):
    """A compressed `StaticLayer`: the first rows are used, without gaps.

    The number of written rows is a tensor. No method of a decode step reads it on the host, so
    compiled graphs and CUDA graphs are not interrupted.

    Attributes
    ----------
    cumulative_length : Tensor of int64, shape ()
        Rows written.
    offset : Tensor of int64, shape ()
        `row_map.dropped` on the device. A Python number would be a constant of the compiled graph.
    """

    plain = StaticLayer
    cumulative_length: Tensor
    offset: Tensor

    def note(self, row_map: RowMap) -> None:
        self.row_map, self.offset = row_map, torch.tensor(row_map.dropped, device=self.device)
        self.note_padding(row_map.real)

    def note_padding(self, real: Tensor | None) -> None:
        """Store the mask of all rows, padded to the static length, so that shapes stay constant."""
        if real is not None:  # rows that are written later are real
            real = nn.functional.pad(real, (0, self.max_cache_len - real.shape[1]), value=True)
        self.row_map.real = real

    def written_rows(self, batch: int) -> Tensor:
        """Mask of the real rows after one row is written, bool (batch, max_cache_len); no host
        read.
        """
        order = torch.arange(self.max_cache_len, device=self.cumulative_length.device)
        written = (order <= self.cumulative_length).expand(batch, -1)
        real = self.row_map.real
        return written if real is None else written & real

    def real_rows(self) -> Tensor:
        """Number of real rows of every sample, int64 (B, 1) or (1, 1); no host read."""
        rows = self.cumulative_length.view(1, 1)
        real = self.row_map.real
        return rows if real is None else rows - (~real).sum(1, keepdim=True)

    def get_seq_length(self, *args: Any) -> Any:
        """Length of the uncompressed sequence, a tensor on the layer's device."""
        return self.cumulative_length + self.offset

    def get_mask_sizes(self, query: int) -> tuple[int, int]:
        """Static length, and entry of the first row in the 2-D mask."""
        self.check_patch()
        return self.max_cache_len, self.row_map.dropped

    def get_max_length(self) -> int:
        """Largest length of the uncompressed sequence that fits."""
        return self.max_cache_len + self.row_map.dropped

    get_max_cache_shape = get_max_length  # its name before transformers 5.13

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        if self.row_map.real is not None:
            self.row_map.real[:, self.rows :] = True

    def reset(self) -> None:
        """Zero all rows in place and restore the class of the layer."""
        super().reset()
        del self.offset


# Compressed class of every transformers class; others are added on first use.
COMPRESSED: dict[type, type] = {
    compressed.plain: compressed
    for compressed in (
        CompressedDynamicLayer,
        CompressedSlidingLayer,
        CompressedStaticLayer,
        CompressedIndexedLayer,
        CompressedHybridLayer,
        CompressedHybridSlidingLayer,
    )
}
DYNAMIC = frozenset(COMPRESSED) - {StaticLayer}


def compress_layer(layer: Any, row_map: RowMap, starts_segment: bool) -> None:
    """Change the class of `layer` to a compressed one if necessary, and set its map."""
    before = 0
    if isinstance(layer, CompressedLayer):
        before = layer.row_map.dropped
        starts_segment = starts_segment or layer.starts_segment
    else:
        plain = type(layer)
        if plain not in COMPRESSED:
            COMPRESSED[plain] = _compressed_class(plain)
        layer.__class__ = COMPRESSED[plain]
        layer.owner = None
    layer.starts_segment = starts_segment
    if isinstance(layer, CompressedStaticLayer):
        layer.note(row_map)
    else:
        layer.row_map = row_map
    if isinstance(layer, CompressedReferenceLayer):
        layer.shorten_prompt(row_map.dropped - before)


def _compressed_class(plain: type) -> type:
    """Create the compressed class of a cache layer class that is not in `COMPRESSED`."""
    if is_reference(plain):
        return compressed_reference(plain)
    # Only the counting of rows changes; rows are quantized as before.
    return type(f"Compressed{plain.__name__}", (CompressedLayer, plain), {"plain": plain})
