"""KV cache layers that know their logical length apart from the rows they hold.

A prompt of eight tokens of which three have left:

    columns of the prompt    0  1  2  3  4  5  6  7
    rows that are held       0  1        4     6  7
    get_seq_length()  8      logical: the column of the next token
    rows              5      physical: what there is to attend to
    dropped           3      the difference

The caller owns the cache, and other objects may hold the layer. A layer therefore stays the same
object, and only its class changes: `compress_layer` makes a `DynamicLayer` a
`CompressedDynamicLayer`, which inherits from it and overrides the two lengths, and `reset` makes
it a `DynamicLayer` again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)

from tokencomp.engine.cache.owner import CacheOwner
from tokencomp.engine.cache.rows import physical_length
from tokencomp.errors import UnsupportedCacheError
from tokencomp.torchlib.cache_classes import INDEXED, STATES

PATCH_GONE = (
    "this cache holds a prompt that a patch has compressed, and that patch is gone: removed, "
    "replaced, suspended, or of another process. Keep the patch while you use its caches "
    "(handle.set changes it in place), or start the conversation again."
)


# Python lets an object change its class only to one of the same memory layout. A base class other
# than CacheLayerMixin would have another layout.
class CompressedLayer(CacheLayerMixin):
    """What every compressed layer adds to the transformers class from which it is built.

    Transformers reads two numbers from a cache layer: how far the sequence has come (positions,
    how many prompt tokens are new, where to crop) and how many rows there are to attend to. For a
    compressed layer these differ by `dropped`. An existing layer becomes one by `compress_layer`;
    `reset` turns it back into what it was.

    Attributes
    ----------
    plain : type
        The transformers class of the layer before compression.
    dropped : int
        Logical length - rows held, the same for every sample.
    columns : Tensor of int64, shape (B, m), or None
        Column of the uncompressed sequence of the first m rows; the others follow without a gap.
        Rows of a merged token have the same.
    starts : Tensor of int64, shape (B,), or None
        First real column of every sample in the uncompressed sequence; None: not known, or 0.
    starts_segment : bool
        True where this layer holds other rows than the layer before it.
    owner : CacheOwner or None
        The patch that has compressed the cache; None: rows were evicted, without a patch.
    seen_below : float
        Logical length below which a single later token attends to every row of this layer and of
        all others, so that it needs no mask; 0: it may need one.
    """

    plain: ClassVar[type]
    dropped: int
    columns: Tensor | None
    starts: Tensor | None
    starts_segment: bool
    owner: CacheOwner | None
    seen_below: float = 0.0
    _valid: Tensor | None
    keys: Any  # for transformers they may be None; what is called here has rows
    values: Any

    @property
    def rows(self) -> int:
        """Rows held (read from the device for a static layer)."""
        return physical_length(self)

    @property
    def valid(self) -> Tensor | None:
        """False at rows that pad a ragged batch, bool (B, rows); None when every row is real.

        Rows written since it was set are real, so that writing a token does not change it.
        """
        valid = self._valid
        if valid is None or valid.shape[1] == self.rows:
            return valid
        self._valid = nn.functional.pad(valid, (0, self.rows - valid.shape[1]), value=True)
        return self._valid

    @valid.setter
    def valid(self, valid: Tensor | None) -> None:
        self._valid = valid

    def get_seq_length(self, *args: Any) -> Any:
        """Logical length."""
        rows = physical_length(self)
        return rows + self.dropped if rows else 0

    def get_mask_sizes(self, query: int) -> tuple[int, int]:
        """Rows after a write of `query` rows, and `dropped`."""
        self.check_patch()
        return physical_length(self) + query, self.dropped

    def check_patch(self) -> None:
        """Refuse a decoder call without the patch that has compressed the cache.

        transformers asks before it runs a layer, and once per call, so that a decode step runs no
        Python of ours per layer.
        """
        if self.owner is not None and not self.owner.active:
            raise UnsupportedCacheError(PATCH_GONE)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Follow the beams."""
        super().reorder_cache(beam_idx)
        self._change_samples(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sample."""
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]  # the other base has it
        self._change_samples(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some samples."""
        super().batch_select_indices(indices)  # type: ignore[misc]  # the other base has it
        self._change_samples(lambda t: t[indices])

    def _change_samples(self, change: Callable[[Tensor], Tensor]) -> None:
        self._change(change)
        self.starts = None if self.starts is None else change(self.starts)

    def _change(self, change: Callable[[Tensor], Tensor]) -> None:
        """Do to the row flags and `columns` what was done to the samples or rows."""
        self._valid = None if self._valid is None else change(self._valid)
        self.columns = None if self.columns is None else change(self.columns)

    def reset(self) -> None:
        """Forget every row and become a plain layer again."""
        super().reset()
        self._forget()

    def _forget(self) -> None:
        del self.dropped, self._valid, self.columns, self.starts, self.starts_segment, self.owner
        vars(self).pop("seen_below", None)
        self.__class__ = self.plain


class CompressedDynamicLayer(CompressedLayer, DynamicLayer):
    """A `DynamicLayer` from which rows have been left out."""

    plain: ClassVar[type] = DynamicLayer

    def crop(self, length: int) -> None:
        """Remove `-length` rows, or (transformers < 5.14) cut to `length` logical tokens.

        A layer that also holds states goes back as many.

        Raises
        ------
        UnsupportedCacheError
            Tokens have left among those to be removed, or are merged, so that rows are not tokens.
        """
        rows = self.rows + length if length <= 0 else length - self.dropped
        rows = min(max(rows, 0), self.rows)
        if self._cuts_media(rows):
            raise UnsupportedCacheError(
                f"crop({length}) reaches into media of which tokens have left. Crop only what "
                "follows the last image or video, or start the conversation again."
            )
        if isinstance(self, STATES):
            STATES.crop(self, length)
        self._cut(rows)
        self._change(lambda t: t[:, :rows])

    def _cuts_media(self, rows: int) -> bool:
        """Whether tokens have left, or are merged, among what stands behind the first `rows`."""
        if self.columns is None or rows >= self.columns.shape[1]:
            return False
        first, valid = max(rows - 1, 0), self.valid
        steps = self.columns[:, first:].diff(dim=1)
        wrong = steps != 1
        if rows > 0:  # a merged token has one column for several rows, of which some may be left
            wrong[:, :1] = steps[:, :1] == 0
        if valid is not None:
            wrong &= valid[:, first : first + wrong.shape[1]].to(wrong.device)
        return bool(wrong.any())

    def _cut(self, rows: int) -> None:
        """Keep the first `rows` rows."""
        self.keys, self.values = self.keys[..., :rows, :], self.values[..., :rows, :]

    def reset(self) -> None:
        """Drop the rows (old releases would only set them to 0) and become a plain layer."""
        super().reset()
        self.keys = self.values = None
        self.is_initialized = False


WHOLE = frozenset({DynamicLayer, CompressedDynamicLayer})
"""Cache layers that hold every row, and nothing beside rows: any row can leave."""


class CompressedSlidingLayer(CompressedDynamicLayer, DynamicSlidingWindowLayer):
    """A `DynamicSlidingWindowLayer` from which rows have been left out.

    It keeps the last `sliding_window - 1` rows, as before. Since rows that are a window apart in
    the uncompressed sequence are fewer now, these are at least those that a window measured in
    columns reaches; the mask hides the others. `rows` counts those that were written, so that the
    row flags and `columns` stay those of the whole sequence.

    Attributes
    ----------
    widened : int
        What `sliding_window` was raised by, see `tokencomp.engine.cache.repeat`; absent: nothing.
    """

    plain = DynamicSlidingWindowLayer

    def get_seq_length(self, *args: Any) -> Any:
        """Logical length."""
        return self.cumulative_length + self.dropped if self.cumulative_length else 0

    def get_mask_sizes(self, query: int) -> tuple[int, int]:
        """Rows that a write of `query` returns, and the logical column of the first."""
        self.check_patch()
        held = min(self.rows, self.sliding_window - 1)
        return held + query, self.rows - held + self.dropped

    def _forget(self) -> None:
        self.sliding_window -= vars(self).pop("widened", 0)
        super()._forget()

    def _cut(self, rows: int) -> None:
        removed, limit = self.rows - rows, self.sliding_window - 1
        held = self.keys.shape[-2]
        if held - removed < min(rows, limit):
            raise RuntimeError(
                f"{removed} rows cannot be removed from a sliding window of {self.sliding_window} "
                "that no longer holds the rows before them. Assisted decoding lets the cache "
                "record them (activate_past_recording)."
            )
        kept = slice(max(held - removed - limit, 0), held - removed)
        self.keys, self.values = self.keys[..., kept, :], self.values[..., kept, :]
        self.cumulative_length = rows


class CompressedIndexedLayer(CompressedDynamicLayer, INDEXED):  # type: ignore[misc]  # older releases lack it
    """A layer of sparse attention: the keys of its indexer have the same rows."""

    plain = INDEXED
    indexer_keys: Tensor | None
    indexer_position_ids: Tensor | None

    def _cut(self, rows: int) -> None:
        super()._cut(rows)
        if self.indexer_keys is not None:
            self.indexer_keys = self.indexer_keys[:, :rows]
        if self.indexer_position_ids is not None:
            self.indexer_position_ids = self.indexer_position_ids[..., :rows]
