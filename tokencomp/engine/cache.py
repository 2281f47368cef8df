"""A KV cache layer that knows its logical length apart from the rows it holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from tokencomp.errors import UnsupportedCacheError


class CompressedLayer(DynamicLayer):
    """A `DynamicLayer` from which rows have been left out.

    Transformers asks a cache layer two things: how far the sequence has come (positions, how many
    prompt tokens are new, where to crop) and how many rows there are to attend to. For a
    compressed layer these differ by `dropped`. An existing layer becomes one by `compress_layer`;
    `reset` turns it back into a plain `DynamicLayer`.

    Attributes
    ----------
    dropped : int
        Logical length - rows held, the same for every sample.
    valid : Tensor of bool, shape (B, rows), or None
        False at rows that pad a ragged batch. None when every row is real.
    sizes : Tensor of float32, shape (B, m), or None
        Tokens that the first m rows stand for under proportional attention; the others, or all
        where it is None, stand for one.
    columns : Tensor of int64, shape (B, m), or None
        Column of the uncompressed sequence of the first m rows; the others follow without a gap.
    starts_segment : bool
        True where this layer holds other rows than the layer before it.
    """

    dropped: int
    valid: Tensor | None
    sizes: Tensor | None
    columns: Tensor | None
    starts_segment: bool

    @property
    def rows(self) -> int:
        return physical_length(self)

    def get_seq_length(self, *args: Any) -> int:
        return self.rows + self.dropped if self.rows else 0

    def get_mask_sizes(self, query: int | Tensor) -> tuple[int, int]:
        n = query if isinstance(query, int) else query.shape[0]
        return self.rows + n, self.dropped

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if self.valid is not None:
            new = self.valid.new_ones(key_states.shape[0], key_states.shape[-2])
            self.valid = torch.cat([self.valid, new], dim=1)
        return super().update(key_states, value_states, *args, **kwargs)

    def crop(self, length: int) -> None:
        """Remove `-length` rows, or (transformers < 5.14) cut to `length` logical tokens."""
        rows = self.rows + length if length <= 0 else length - self.dropped
        if rows >= self.rows:
            return
        rows = max(rows, 0)
        self.keys, self.values = self.keys[..., :rows, :], self.values[..., :rows, :]  # type: ignore[index]
        self._change(lambda t: t[:, :rows])

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]
        self._change(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._change(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._change(lambda t: t[indices])

    def _change(self, change: Callable[[Tensor], Tensor]) -> None:
        """Do to `valid`, `sizes` and `columns` what was done to the rows."""
        self.valid = None if self.valid is None else change(self.valid)
        self.sizes = None if self.sizes is None else change(self.sizes)
        self.columns = None if self.columns is None else change(self.columns)

    def reset(self) -> None:
        self.keys = self.values = None
        self.is_initialized = False
        del self.dropped, self.valid, self.sizes, self.columns, self.starts_segment
        self.__class__ = DynamicLayer  # type: ignore[assignment]


PLAIN = (DynamicLayer, DynamicSlidingWindowLayer, CompressedLayer)


def physical_length(layer: Any) -> int:
    """Rows held by a cache layer."""
    keys = getattr(layer, "keys", None)
    return keys.shape[-2] if keys is not None and keys.numel() else 0


def check_cache(cache: Any) -> None:
    """Raise `UnsupportedCacheError` unless every layer of `cache` can be compressed.

    Layers with a sliding window can while it holds all rows, see `check_attention_window`.
    """
    if cache is None:
        return
    layers = getattr(cache, "layers", None)
    if layers is None:
        raise UnsupportedCacheError(
            f"{type(cache).__name__}: continuous batching and legacy caches hold rows that cannot "
            "differ per layer. Use generate() with a DynamicCache (the default)."
        )
    replicate = getattr(cache, "layer_class_to_replicate", None)
    kinds = {type(layer) for layer in layers} | ({replicate} if replicate else set())
    wrong = sorted(k.__name__ for k in kinds if k not in PLAIN)
    if wrong or getattr(cache, "offloading", False):
        given = ", ".join(wrong) or "an offloaded cache"
        raise UnsupportedCacheError(
            f"{type(cache).__name__} holds {given}; compressed prompts need plain DynamicLayer "
            "rows (static, quantized and offloaded caches fix the length or layout). "
            "Drop cache_implementation=..., or turn compression off with handle.disabled()."
        )


def compress_layer(
    layer: Any,
    dropped: int,
    valid: Tensor | None,
    starts_segment: bool,
    sizes: Tensor | None = None,
    columns: Tensor | None = None,
) -> None:
    """Make `layer` a `CompressedLayer` (if it is none yet) with `dropped` more tokens left out."""
    before = 0
    if isinstance(layer, CompressedLayer):
        before, starts_segment = layer.dropped, starts_segment or layer.starts_segment
    else:
        layer.__class__ = CompressedLayer
    layer.dropped, layer.valid, layer.sizes = before + dropped, valid, sizes
    layer.columns = columns
    layer.starts_segment = starts_segment
