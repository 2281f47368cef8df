"""Compressed cache layers of constant length, for compiled decoding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import StaticLayer

from tokencomp.engine.cache.layers import CompressedLayer


class CompressedStaticLayer(CompressedLayer, StaticLayer):
    """A `StaticLayer` that holds a compressed prompt: its rows lie at the front, without gaps.

    The number of written rows is a tensor, and no method that a decode step calls reads it on the
    host, so that neither a compiled graph nor a CUDA graph is interrupted.

    Attributes
    ----------
    cumulative_length : Tensor of int64, shape ()
        Rows written.
    offset : Tensor of int64, shape ()
        `dropped` on the device: a number would be compiled into the graph of every prompt.
    """

    plain = StaticLayer
    cumulative_length: Tensor
    offset: Tensor

    @property
    def valid(self) -> Tensor | None:
        """False at rows that pad a ragged batch, bool (B, rows); None when every row is real."""
        return None if self._valid is None else self._valid[:, : self.rows]

    @valid.setter
    def valid(self, valid: Tensor | None) -> None:
        if valid is not None:  # rows that are written later are real
            free = self.max_cache_len - valid.shape[1]
            valid = nn.functional.pad(valid, (0, free), value=True).to(self.keys.device)
        self._valid = valid

    @property
    def unpadded(self) -> Tensor | None:
        """The row flags over the whole length of the layer, bool (B, max_cache_len), or None."""
        return self._valid

    def written_rows(self, batch: int) -> Tensor:
        """Real rows after a write of one row, bool (batch, max_cache_len), without a host read."""
        order = torch.arange(self.max_cache_len, device=self.cumulative_length.device)
        written = (order <= self.cumulative_length).expand(batch, -1)
        return written if self._valid is None else written & self._valid

    def real_rows(self) -> Tensor:
        """Real rows of every sample, int64, (B, 1) or (1, 1), without a host read."""
        rows = self.cumulative_length.view(1, 1)
        if self._valid is None:
            return rows
        return rows - (~self._valid).sum(1, keepdim=True)

    def get_seq_length(self, *args: Any) -> Any:
        """Logical length, a tensor on the layer's device."""
        return self.cumulative_length + self.offset

    def get_mask_sizes(self, query: int) -> tuple[int, int]:
        """Rows that the layer can hold, and the logical column of the first."""
        self.check_patch()
        return self.max_cache_len, self.dropped

    def get_max_length(self) -> int:
        """Logical tokens that fit."""
        return self.max_cache_len + self.dropped

    get_max_cache_shape = get_max_length  # its name before transformers 5.13

    def crop(self, tokens_to_remove: int) -> None:
        """Remove `-tokens_to_remove` rows."""
        super().crop(tokens_to_remove)
        if self._valid is not None:
            self._valid[:, self.rows :] = True

    def reset(self) -> None:
        """Set every row to 0 and become a plain layer again; the memory stays where it is."""
        super().reset()
        del self.offset
