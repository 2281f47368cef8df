"""Compressed cache layers beyond those that keep every row, or a window of rows, and nothing else.

Static layers have a constant length, for compiled decoding. Hybrid layers hold states of short
convolutions as well. Unlimited-OCR keeps all rows of the prompt, and a window of the rows that
follow; its class is part of the code of that model, so that it is known only when one is met.
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
    """A layer that attends to all; its states are those after the last row."""

    plain: ClassVar[type] = HYBRID


class CompressedHybridSlidingLayer(CompressedSlidingLayer, HYBRID_SLIDING):  # type: ignore[misc]  # older releases lack it
    """A layer with an attention window; its states are those after the last row."""

    plain = HYBRID_SLIDING


class CompressedReferenceLayer(CompressedDynamicLayer):
    """What every compressed layer of this kind adds to the class of the model.

    Attributes
    ----------
    prefill_length : int
        Rows to be kept for good, as far as they are known before they are written.
    prefill_cumulative_length, cumulative_length : int
        Rows written that are kept for good, and rows written after them.
    """

    prefill_length: int
    prefill_cumulative_length: int
    cumulative_length: int

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Rows that a write of `query_length` returns, and columns minus rows of the later ones."""
        self.check_patch()
        plain: Any = self.plain
        rows, evicted = plain.get_mask_sizes(self, query_length)
        return rows, evicted + self.row_map.dropped

    def shorten_prompt(self, dropped: int) -> None:
        """Correct the length of the prompt, which `generate` gives before the prefill.

        Without it the first call gives the length, by the rows that it writes.
        """
        if self.prefill_length > self.prefill_cumulative_length:
            self.prefill_length -= dropped

    def _cut(self, rows: int) -> None:
        plain: Any = self.plain
        plain.crop(self, rows - self.rows)


@functools.cache
def compressed_reference(plain: type) -> type:
    """The compressed class of such a class, which comes with a model."""
    name, kind = f"Compressed{plain.__name__}", vars(plain)["_layer_type"]
    # transformers would use a subclass that is defined with `_layer_type` for all new caches, so
    # the kind is set afterwards.
    members = {"plain": plain, "_layer_type": None}
    compressed: Any = type(name, (CompressedReferenceLayer, plain), members)
    compressed._layer_type = kind
    return compressed  # type: ignore[no-any-return]  # a class


class CompressedStaticLayer(CompressedLayer, StaticLayer):
    """A `StaticLayer` that holds a compressed prompt: its rows are the first ones, without gaps.

    The number of written rows is a tensor, and no method that a decode step calls reads it on the
    host, so that neither a compiled graph nor a CUDA graph is interrupted.

    Attributes
    ----------
    cumulative_length : Tensor of int64, shape ()
        Rows written.
    offset : Tensor of int64, shape ()
        `row_map.dropped` on the device: a number would be compiled into the graph of every prompt.
    """

    plain = StaticLayer
    cumulative_length: Tensor
    offset: Tensor

    def note(self, row_map: RowMap) -> None:
        """Take the map of the rows."""
        self.row_map, self.offset = row_map, torch.tensor(row_map.dropped, device=self.device)
        self.note_padding(row_map.real)

    def note_padding(self, real: Tensor | None) -> None:
        """Take the mask of all rows, over the whole length, so that shapes stay constant."""
        if real is not None:  # rows that are written later are real
            real = nn.functional.pad(real, (0, self.max_cache_len - real.shape[1]), value=True)
        self.row_map.real = real

    def written_rows(self, batch: int) -> Tensor:
        """Real rows after a write of one row, bool (batch, max_cache_len), without a host read."""
        order = torch.arange(self.max_cache_len, device=self.cumulative_length.device)
        written = (order <= self.cumulative_length).expand(batch, -1)
        real = self.row_map.real
        return written if real is None else written & real

    def real_rows(self) -> Tensor:
        """Real rows of every sample, int64, (B, 1) or (1, 1), without a host read."""
        rows = self.cumulative_length.view(1, 1)
        real = self.row_map.real
        return rows if real is None else rows - (~real).sum(1, keepdim=True)

    def get_seq_length(self, *args: Any) -> Any:
        """Length of the uncompressed sequence, a tensor on the layer's device."""
        return self.cumulative_length + self.offset

    def get_mask_sizes(self, query: int) -> tuple[int, int]:
        """Rows that the layer can hold, and how many columns were dropped."""
        self.check_patch()
        return self.max_cache_len, self.row_map.dropped

    def get_max_length(self) -> int:
        """Tokens of the uncompressed sequence that fit."""
        return self.max_cache_len + self.row_map.dropped

    get_max_cache_shape = get_max_length  # its name before transformers 5.13

    def crop(self, tokens_to_remove: int) -> None:
        """Remove `-tokens_to_remove` rows."""
        super().crop(tokens_to_remove)
        if self.row_map.real is not None:
            self.row_map.real[:, self.rows :] = True

    def reset(self) -> None:
        """Set every row to 0 and become a plain layer again; the memory stays where it is."""
        super().reset()
        del self.offset


# Compressed classes by transformers' classes; others are made when a cache has them.
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
    """Make `layer` a compressed one, if it is none yet, with the rows of `row_map`."""
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
    """The compressed class of a class of cache layers that `COMPRESSED` does not have yet."""
    if is_reference(plain):
        return compressed_reference(plain)
    # Rows are quantized as before: only the counting changes.
    return type(f"Compressed{plain.__name__}", (CompressedLayer, plain), {"plain": plain})
