"""KV cache layers of a compressed prompt: they hold fewer rows than the sequence has columns.

A prompt of eight tokens, three of them dropped:

    columns of the prompt    0  1  2  3  4  5  6  7
    rows that are held       0  1        4     6  7
    get_seq_length()  8      the column of the next token
    rows              5      the rows written; a sliding layer holds the last of them
    row_map                  which column each row holds, see `tokencomp.engine.rowmap`

The caller owns the cache, and other objects may hold the layer. A layer therefore stays the same
object, and only its class changes: `compress_layer` makes a `DynamicLayer` a
`CompressedDynamicLayer`, which inherits from it and overrides the two lengths, and `reset` makes
it a `DynamicLayer` again.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
)

from tokencomp.engine.memory import Memory
from tokencomp.engine.rowmap import RowMap
from tokencomp.errors import UnsupportedCacheError
from tokencomp.tokens.tokens import Modality
from tokencomp.torchlib.cache_classes import HYBRID, HYBRID_SLIDING, INDEXED, QUANTIZED, STATES

REFERENCE = "reference_sliding_attention"


def is_reference(kind: type) -> bool:
    """Whether layers of this class keep all rows of the prompt, and a window of later rows."""
    name = getattr(kind, "_layer_type", None)
    return name == REFERENCE and not issubclass(kind, StaticLayer)


def first_layer(cache: Any, start: int = 0) -> Any:
    """The first layer from `start` on that holds rows, or None; `cache` may be a list of layers.

    Only layers of the base class CacheLayerMixin have keys and values, one row per token. Layers of
    linear attention and of short convolutions hold a state without a token axis instead; others
    (experts only, keys shared with another layer) cache nothing.
    """
    layers = cache if isinstance(cache, (list, tuple)) else getattr(cache, "layers", None)
    for layer in (layers or ())[start:]:  # a plain loop: runs for every token
        if isinstance(layer, CacheLayerMixin):
            return layer
    return None


def physical_length(layer: Any) -> int:
    """Number of rows written to a cache layer; a sliding layer holds the last of them."""
    if isinstance(layer, StaticLayer):
        if not layer.is_initialized:
            return 0
        return int(layer.cumulative_length)
    if getattr(layer, "_layer_type", None) == REFERENCE:
        return int(layer.prefill_cumulative_length + layer.cumulative_length)
    # Their `keys` hold only the latest rows: those not yet quantized, or those in the window.
    if isinstance(layer, (QUANTIZED, DynamicSlidingWindowLayer)):
        return layer.cumulative_length
    keys = getattr(layer, "keys", None)
    return keys.shape[-2] if keys is not None and keys.numel() else 0


def stored(layer: Any, name: Literal["keys", "values"]) -> Tensor:
    """Keys or values of a layer, (B, kv heads, rows or more, d); the first rows are used."""
    rows: Tensor = getattr(layer, name)
    if not isinstance(layer, QUANTIZED):
        return rows
    # All rows but the latest are quantized; a reordering by beam search may not have reached them.
    first: Tensor = layer._dequantize(getattr(layer, f"_quantized_{name}"))
    if getattr(layer, "_pending_beam_idx", None) is not None:
        first = first.index_select(0, layer._pending_beam_idx.to(first.device))
    return torch.cat([first, rows], dim=-2) if rows.numel() else first


# -- compressed layers --------------------------------------------------------------------------


class CacheOwner:
    """Whether the patch that compressed a cache is still installed; copies share it."""

    def __init__(self, compact: bool) -> None:
        self.compact = compact  # positions count kept tokens only
        self.active = False  # the hooks of the patch are installed
        self.types: Any = None  # `LayerTypes` of the decoder at the last prompt

    def __deepcopy__(self, memo: dict[int, Any]) -> CacheOwner:
        return self

    def __reduce__(self) -> Any:  # a cache loaded from a file has no patch
        return CacheOwner, (self.compact,)


# Python lets an object change its class only to one of the same memory layout. A base class other
# than CacheLayerMixin would have another layout.
class CompressedLayer(CacheLayerMixin):
    """Mixin that turns a transformers cache layer into a compressed one.

    Transformers reads two numbers from a cache layer: the length of the sequence (for positions,
    new tokens, crop) and the number of rows to attend to. In a compressed layer they differ by
    `row_map.dropped`. `compress_layer` changes the class of an existing layer; `reset` changes it
    back.

    Attributes
    ----------
    plain : type
        The transformers class of the layer before compression.
    row_map : RowMap
        The rows as of the last call that changed it. Decode steps write rows without changing it:
        they are real, with consecutive columns, so that tensors of the map may be shorter than
        `rows`. `current_map` counts them.
    starts_segment : bool
        True if this layer holds other rows than the layer before it.
    owner : CacheOwner or None
        The patch that compressed the cache; None if rows were evicted without a patch.
    """

    plain: ClassVar[type]
    row_map: RowMap
    starts_segment: bool
    owner: CacheOwner | None
    keys: Any  # for transformers they may be None; what is called here has rows
    values: Any
    device: Any

    @property
    def rows(self) -> int:
        """Number of rows (read from the device for a static layer)."""
        return physical_length(self)

    @property
    def current_map(self) -> RowMap:
        """`row_map`, including rows written since."""
        return replace(self.row_map, rows=self.rows)

    def get_seq_length(self, *args: Any) -> Any:
        """Length of the uncompressed sequence."""
        rows = self.rows
        return rows + self.row_map.dropped if rows else 0

    def get_mask_sizes(self, query: int) -> tuple[int, int]:
        """Rows after a write of `query` rows, and entry of the first in the 2-D mask."""
        self.check_patch()
        return self.rows + query, self.row_map.dropped

    def note_padding(self, real: Tensor | None) -> None:
        """Store the mask of all rows, after a call that wrote padding rows."""
        self.row_map.real = real

    def check_patch(self) -> None:
        """Raise if the patch that compressed the cache is gone.

        transformers calls this once per call before the layers run, so a decode step runs no code
        of ours per layer.
        """
        if self.owner is not None and not self.owner.active:
            raise UnsupportedCacheError(
                "this cache holds a prompt that a patch has compressed, and that patch is gone: "
                "removed, replaced, suspended, or of another process. Keep the patch while you use "
                "its caches (handle.set changes it in place), or start the conversation again."
            )

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self.row_map = self.row_map.select(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]  # the other base has it
        self.row_map = self.row_map.select(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)  # type: ignore[misc]  # the other base has it
        self.row_map = self.row_map.select(lambda t: t[indices])

    def _rows_after_crop(self, length: int) -> int:
        """Rows that `crop(length)` leaves; media with dropped or merged tokens must not leave."""
        # transformers >= 5.14 passes minus the number of removed tokens, older releases a length in
        # columns.
        rows = self.rows + length if length <= 0 else length - self.row_map.dropped
        rows = min(max(rows, 0), self.rows)
        if self._cuts_media(rows):
            raise UnsupportedCacheError(
                f"crop({length}) reaches into media with dropped or merged tokens. Crop only text "
                "after the last image or video, or start the conversation again."
            )
        return rows

    def _cuts_media(self, rows: int) -> bool:
        """Whether tokens after the first `rows` rows were dropped or merged."""
        columns, weights = self.row_map.columns, self.row_map.weights
        if columns is None or rows >= columns.shape[1]:
            return False
        if weights is not None and bool((weights[:, rows:] > 1).any()):
            return True
        # Dropped tokens are gaps in the columns of the removed rows, or right before them.
        first, real = max(rows - 1, 0), self.current_map.mask()
        wrong = columns[:, first:].diff(dim=1) != 1
        if rows > 0:  # tokens that were dropped before the first row that leaves remain dropped
            wrong[:, :1] = False
        if real is not None:
            wrong &= real[:, first : first + wrong.shape[1]].to(wrong.device)
        return bool(wrong.any())

    def reset(self) -> None:
        """Delete all rows (a static layer zeroes them) and restore the class of the layer."""
        super().reset()
        for name in ("row_map", "starts_segment", "owner", "offset"):
            vars(self).pop(name, None)
        self.__class__ = self.plain


class CompressedDynamicLayer(CompressedLayer, DynamicLayer):
    """A compressed `DynamicLayer`."""

    plain: ClassVar[type] = DynamicLayer

    def crop(self, length: int) -> None:
        """Remove `-length` rows, or (transformers < 5.14) cut to `length` columns. States go back
        as many. Refused as by `_rows_after_crop`.
        """
        rows = self._rows_after_crop(length)
        if isinstance(self, STATES):
            STATES.crop(self, length)
        self._cut(rows)
        self.row_map = self.row_map.cut(rows)

    def _cut(self, rows: int) -> None:
        self.keys, self.values = self.keys[..., :rows, :], self.values[..., :rows, :]

    def reset(self) -> None:
        """Delete the rows (older releases only zero them) and restore the class of the layer."""
        super().reset()
        self.keys = self.values = None
        self.is_initialized = False


WHOLE = frozenset({DynamicLayer, CompressedDynamicLayer})
"""Classes of cache layers that hold all rows and nothing else, so that any row can be evicted."""


class CompressedSlidingLayer(CompressedDynamicLayer, DynamicSlidingWindowLayer):
    """A compressed `DynamicSlidingWindowLayer`.

    It holds the last `sliding_window - 1` rows, as before; `rows` and `row_map` count all rows
    written (`cumulative_length`). Invariant, per sample:

        every column within a window of the next token is in a row that the layer still holds.

    Dropping and merging preserve it: the last W - 1 rows have W - 1 different columns, so they
    reach back at least as far. The mask hides rows beyond the window. Guarded by
    `tests/engine/test_rowmap.py` and `tests/exactness/test_windows.py`.
    """

    plain = DynamicSlidingWindowLayer

    def get_mask_sizes(self, query: int) -> tuple[int, int]:
        """Rows that a write of `query` returns, and entry of the first in the 2-D mask."""
        self.check_patch()
        held = min(self.rows, int(self.sliding_window) - 1)
        return held + query, self.rows - held + self.row_map.dropped

    def _cut(self, rows: int) -> None:
        removed, limit = self.rows - rows, self.sliding_window - 1
        held = self.keys.shape[-2]
        if held - removed < min(rows, limit):
            raise RuntimeError(
                f"{removed} rows cannot be removed from a sliding window of {self.sliding_window} "
                "that no longer holds the rows before them. Assisted decoding lets the cache "
                "record them (activate_past_recording)."
            )
        # Window 5 (limit 4), rows 4 … 9 recorded, cut to 8 rows: removed 2, slice 0:4, rows 4 … 7.
        kept = slice(max(held - removed - limit, 0), held - removed)
        self.keys, self.values = self.keys[..., kept, :], self.values[..., kept, :]
        self.cumulative_length = rows


class CompressedIndexedLayer(CompressedDynamicLayer, INDEXED):  # type: ignore[misc]  # older releases lack it
    """A compressed layer of sparse attention: the keys of its indexer have the same rows."""

    plain = INDEXED
    indexer_keys: Tensor | None
    indexer_position_ids: Tensor | None

    def _cut(self, rows: int) -> None:
        super()._cut(rows)
        if self.indexer_keys is not None:
            self.indexer_keys = self.indexer_keys[:, :rows]
        if self.indexer_position_ids is not None:
            self.indexer_position_ids = self.indexer_position_ids[..., :rows]


# -- layers of less common classes ----------------------------------------------------------------
# Hybrid layers also hold states of short convolutions. Reference layers (Unlimited-OCR) keep all
# rows of the prompt and a window of later rows; their class is defined by the model's code, so its
# compressed class is created on first use. Static layers have a constant length, for compiled
# decoding.


class CompressedHybridLayer(CompressedDynamicLayer, HYBRID):  # type: ignore[misc]  # of type Any
    """Full attention and a state, which is that after the last row."""

    plain: ClassVar[type] = HYBRID


class CompressedHybridSlidingLayer(CompressedSlidingLayer, HYBRID_SLIDING):  # type: ignore[misc]  # older releases lack it
    """Windowed attention and a state, which is that after the last row."""

    plain = HYBRID_SLIDING


class CompressedReferenceLayer(CompressedDynamicLayer):
    """Mixin of compressed reference layers."""

    prefill_length: int  # prompt rows to keep, if known before they are written
    prefill_cumulative_length: int  # prompt rows written
    cumulative_length: int  # rows written after the prompt

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Rows that a write of `query_length` returns, and entry of the first in the 2-D mask."""
        self.check_patch()
        plain: Any = self.plain
        # transformers counts evicted rows as entries; dropped columns are entries, too.
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


class CompressedStaticLayer(CompressedLayer, StaticLayer):
    """A compressed `StaticLayer`: the first rows are used, without gaps.

    The number of written rows is a tensor. No method of a decode step reads it on the host, so
    compiled graphs and CUDA graphs are not interrupted.
    """

    plain = StaticLayer
    cumulative_length: Tensor  # rows written, int64, shape ()
    offset: Tensor  # `row_map.dropped` on the device: a number would be a constant of the graph

    def note(self, row_map: RowMap) -> None:
        self.row_map, self.offset = row_map, torch.tensor(row_map.dropped, device=self.device)
        self.note_padding(row_map.real)
        weights = row_map.weights
        if weights is not None:  # rows that are written later weigh one
            more = self.max_cache_len - weights.shape[1]
            row_map.weights = nn.functional.pad(weights, (0, more), value=1.0)

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
        """Remove rows, see `CompressedDynamicLayer.crop`."""
        rows = self._rows_after_crop(tokens_to_remove)
        super().crop(tokens_to_remove)
        self.note(self.row_map.cut(rows))


# -- what a cache shows of pictures ---------------------------------------------------------------


def memory_of(cache: Any) -> Memory:
    """What the rows of a cache show; nothing for a cache that is not compressed."""
    layer = first_layer(cache)
    return layer.row_map.memory if isinstance(layer, CompressedLayer) else Memory()


def forget(cache: Any, modalities: Collection[Modality]) -> None:
    """Note that pictures of some modalities enter which later ones cannot be compared with."""
    layer = first_layer(cache)
    if isinstance(layer, CompressedLayer):
        memory = layer.row_map.memory.forget(modalities)
        layer.row_map = replace(layer.row_map, memory=memory)


# -- a layer becomes a compressed one -------------------------------------------------------------

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
    # The prompt length of an earlier turn is without the tokens that it dropped.
    if isinstance(layer, CompressedReferenceLayer):
        layer.shorten_prompt(row_map.dropped - before)


def _compressed_class(plain: type) -> Any:
    """Create the compressed class of a reference class, or of a class of quantized layers.

    Only the counting of rows changes in the latter; rows are quantized as before.
    """
    base = CompressedReferenceLayer if is_reference(plain) else CompressedLayer
    # transformers registers subclasses defined with `_layer_type` for all new caches, so the type
    # is set afterwards.
    members = {"plain": plain, "_layer_type": None}
    compressed: Any = type(f"Compressed{plain.__name__}", (base, plain), members)
    compressed._layer_type = getattr(plain, "_layer_type", None)
    return compressed


# -- after a call: what its layers have written ---------------------------------------------------


def note_prompt(call: Any, cache: Any, owner: CacheOwner) -> Any:
    """Store the map of a prompt on the cache; returns its first layer with rows, or None.

    `call` is a `Call`, whose module imports this one.
    """
    starts, owner.types = call.first_columns(), call.layer_types
    if cache is not None:
        count_columns(cache, call.length)
    first = first_layer(cache)
    if first is None or first.keys is None:  # checkpointed layers do not write to the cache
        return None
    for segment in call.segments:
        last = segment is call.segments[-1]  # a layer that runs twice has two cache layers
        layers = cache.layers[segment.first : None if last else segment.stop]
        # Decoders can leave layers of their cache unused.
        layers = [x for x in layers if isinstance(x, CacheLayerMixin) and x.is_initialized]
        if not layers:
            continue
        device = layers[0].device
        row_map = segment.past.append(segment.counted, len(call.spans), device)
        row_map.starts = starts
        for layer in layers:
            moved = row_map if layer.device == device else row_map.to(layer.device)
            compress_layer(layer, moved, layer is layers[0] and segment.first > 0)
            layer.owner = owner
    first.row_map = replace(first.row_map, memory=call.memory_after(first))
    return first


def count_columns(cache: Any, columns: int) -> None:
    """Set the counters of layers with a state to the columns of the sequence.

    Since transformers 5.25 such a layer counts the rows that it reads, and `get_seq_length` of a
    cache asks layer 0, whatever it holds: after 8 columns of which 5 rows were kept it would
    answer 5. Later rows are columns, too, so that the counter stays right.
    """
    for layer in cache.layers:
        counter = getattr(layer, "cumulative_length_linear", None)
        if counter is not None:
            counter.fill_(columns)


def note_turn(call: Any, cache: Any) -> None:
    """Store which rows of the cache are real, if later tokens had padding."""
    if cache is None or call.segments[0].new.mask() is None:
        return
    for segment in call.segments:
        for layer in cache.layers[segment.first : segment.stop]:
            if isinstance(layer, CompressedLayer):
                layer.note_padding(segment.mask(layer.device))
