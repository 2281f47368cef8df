"""M-RoPE with data-dependent selection, exact in any dtype, without engine support.

Before the vision tower has run nobody knows which tokens stay, but only *their* positions depend
on it: text and later media stand where the full grid puts them. So the engine gets exact text
positions and, for a compressed item, its base position. Kept rows bring their (t, h, w) offsets
from that base along, as base-256 digits (integers up to 255 are exact in bfloat16), and `forward`
adds them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from vllm.multimodal.utils import copy_mm_embedding_modality

from tokencomp.serving.items import ItemPlan
from tokencomp.serving.vllm.model import CompressingModel, NoEncoderGraphs
from tokencomp.serving.vllm.processing import field_name

DIGITS = 6


def pack_offsets(offsets: Tensor, dtype: torch.dtype) -> Tensor:
    """Offsets (3, k) in 0 … 65535 → digits (k, 6), exact in `dtype`."""
    if offsets.numel() and not 0 <= int(offsets.min()) <= int(offsets.max()) < 65536:
        raise RuntimeError(f"position offsets up to {int(offsets.max())} do not fit 16 bits.")
    return torch.cat([offsets >> 8, offsets & 255]).T.to(dtype)


def unpack_offsets(digits: Tensor) -> Tensor:
    """Digits (k, 6) → offsets (3, k), int64."""
    high, low = digits.float().round().long().T.chunk(2)
    return high * 256 + low


def grid_offsets(grid: tuple[int, int, int], t_factor: float) -> np.ndarray:
    """Offsets (3, t·h·w) of a grid from its base; frames are `t_factor` apart, cut to integers."""
    offsets = np.indices(grid).reshape(3, -1)
    if t_factor != 1.0:
        offsets[0] = (offsets[0] * t_factor).astype(np.int64)
    return offsets


def _text(n: int, first: int) -> np.ndarray:
    """Positions (3, n) of text tokens."""
    return np.broadcast_to(np.arange(first, first + n), (3, n))


class MRopeModel(NoEncoderGraphs, CompressingModel):
    """Mixin for models of the Qwen2-VL kind."""

    needs_offsets: ClassVar[bool] = True
    _pending: tuple[Tensor, Tensor] | None = None

    # -- in the vision step ---------------------------------------------------------------------

    def slice_items(self, kwargs: Mapping[str, Any], first: int, stop: int) -> dict[str, Any]:
        """Pixels of all items are concatenated; a grid per item says where each one starts."""
        kind = "image" if "image_grid_thw" in kwargs else "video"
        sizes = kwargs[f"{kind}_grid_thw"].prod(-1).tolist()
        start, end = sum(sizes[:first]), sum(sizes[:stop])
        return {
            name: value[start:end] if name.startswith("pixel_values") else value[first:stop]
            for name, value in kwargs.items()
        }

    def t_factor(self, kwargs: Mapping[str, Any], item: int) -> float:
        """Positions between two frames of an item of a batch."""
        return 1.0

    def finish_item(
        self, plan: ItemPlan, rows: Tensor, index: Tensor, kwargs: Mapping[str, Any], item: int
    ) -> Tensor:
        if rows.shape[0] == plan.full:
            return rows
        factor = self.t_factor(kwargs, item) if plan.kind == "video" else 1.0
        table = torch.from_numpy(grid_offsets(plan.spans[0].grid, factor))
        offsets = table[:, index.cpu()]
        return torch.cat([rows, pack_offsets(offsets, rows.dtype).to(rows.device)], dim=1)

    # -- when a request arrives -----------------------------------------------------------------

    def get_mrope_input_positions(self, input_tokens: Any, mm_features: Any) -> tuple[Tensor, int]:
        """Positions (3, n) with every kept media row at the base of its item, and the delta."""
        pieces: list[np.ndarray] = []
        start = position = 0
        ordered = sorted(mm_features, key=lambda f: f.mm_position.offset)
        grids = self.iter_mm_grid_thw(mm_features)  # type: ignore[attr-defined]
        for feature, (offset, t, h, w, factor) in zip(ordered, grids, strict=True):
            pieces.append(
                np.broadcast_to(np.arange(offset - start), (3, offset - start)) + position
            )
            base = position + offset - start
            full, length = grid_offsets((t, h, w), factor), feature.mm_position.length
            compressed = field_name(feature.modality) in feature.data
            if length != full.shape[1] and not compressed:
                raise RuntimeError(f"{length} placeholders for an uncompressed grid {(t, h, w)}")
            pieces.append(base + (np.zeros((3, length)) if length != full.shape[1] else full))
            position, start = base + int(full.max()) + 1, offset + length
        rest = len(input_tokens) - start
        pieces.append(_text(rest, position))
        positions = np.concatenate(pieces, axis=1).astype(np.int64)
        return torch.from_numpy(positions), position + rest - len(input_tokens)

    # -- in every step --------------------------------------------------------------------------

    def embed_input_ids(
        self,
        input_ids: Tensor,
        multimodal_embeddings: Any = None,
        *,
        is_multimodal: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Cut the offset columns off and note them for `forward`."""
        self._pending = None
        hidden = self.language_model.config.hidden_size  # type: ignore[attr-defined]
        given = multimodal_embeddings if multimodal_embeddings is not None else ()
        if any(e.shape[1] != hidden for e in given):
            plain, offsets = [], []
            for e in given:
                plain.append(copy_mm_embedding_modality(e, e[:, :hidden]))
                offsets.append(
                    unpack_offsets(e[:, hidden:])
                    if e.shape[1] > hidden
                    else torch.zeros(3, e.shape[0], dtype=torch.long, device=e.device)
                )
            rows = is_multimodal.nonzero()[:, 0]  # type: ignore[union-attr]
            self._pending = rows, torch.cat(offsets, dim=1)
            multimodal_embeddings = plain
        return super().embed_input_ids(  # type: ignore[misc]
            input_ids, multimodal_embeddings, is_multimodal=is_multimodal, **kwargs
        )

    def forward(self, input_ids: Any, positions: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Add the noted offsets in place: graphs read the engine's own position buffer."""
        if self._pending is not None:
            rows, offsets = self._pending
            self._pending = None
            positions[:, rows.to(positions.device)] += offsets.to(positions)
        return super().forward(input_ids, positions, *args, **kwargs)  # type: ignore[misc]
