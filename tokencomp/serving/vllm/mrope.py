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
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.rotary_embedding.mrope import MRotaryEmbedding
from vllm.multimodal.utils import copy_mm_embedding_modality

from tokencomp.errors import OptionError
from tokencomp.serving.vllm.item_plan import ItemPlan, Layout, field_name
from tokencomp.serving.vllm.model import CompressingModel, NoEncoderGraphs
from tokencomp.serving.vllm.processing import CompressingProcessor

MAX_OFFSET = 65535
TABLE_FACTOR = 4  # rotary tables hold this many times the model's positions


def pack_offsets(offsets: Tensor, dtype: torch.dtype) -> Tensor:
    """Offsets (3, k) in 0 … 65535 → digits (k, 6), exact in `dtype`."""
    if offsets.numel() and not 0 <= int(offsets.min()) <= int(offsets.max()) <= MAX_OFFSET:
        raise RuntimeError(f"position offsets up to {int(offsets.max())} do not fit 16 bits.")
    return torch.cat([offsets >> 8, offsets & 255]).T.to(dtype)


def with_offsets(rows: Tensor, offsets: Tensor) -> Tensor:
    """Rows (k, d) with the digits of their offsets (3, k) as further columns."""
    return torch.cat([rows, pack_offsets(offsets, rows.dtype).to(rows.device)], dim=1)


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


def lengthen_tables(model: nn.Module, length: int) -> None:
    """Let all rotary tables of a model hold positions below `length`; entries stay the same."""
    for table in {m for m in model.modules() if isinstance(m, MRotaryEmbedding)}:
        old = table.cos_sin_cache
        if old.shape[0] >= length:
            continue
        # the engine's own method would scale YaRN's frequencies to the new length
        inv_freq = table._compute_inv_freq(table.scaling_factor or table.base)
        angles = torch.arange(old.shape[0], length, dtype=torch.float)[:, None] * inv_freq
        more = torch.cat([angles.cos(), angles.sin()], dim=-1) * table.mscale
        table.cos_sin_cache = torch.cat([old, more.to(old)])


def _text(n: int, first: int) -> np.ndarray:
    """Positions (3, n) of text tokens."""
    return np.broadcast_to(np.arange(first, first + n), (3, n))


def grid_extent(grid: tuple[int, int, int], t_factor: float = 1.0) -> int:
    """Positions from the base of a grid to what follows it."""
    t, h, w = grid
    return max(int((t - 1) * t_factor) + 1, h, w)


class MRopeProcessor(CompressingProcessor):
    """Processor half: every item is one t × h × w grid, and keeps its extent in positions."""

    def layouts(self, modality: str, items: Any, hf_inputs: Any) -> list[list[Layout]]:
        merge = self.info.get_hf_config().vision_config.spatial_merge_size  # type: ignore[attr-defined]
        grids = hf_inputs[f"{modality}_grid_thw"].tolist()
        return [[Layout((t, h // merge, w // merge))] for t, h, w in grids]

    def extents(self, modality: str, layouts: Any, hf_inputs: Any) -> list[int]:
        return [grid_extent(spans[0].grid) for spans in layouts]

    def check_positions(self, plans: list[ItemPlan]) -> None:
        """Positions go beyond the prompt's length where many tokens of a long grid leave.

        Raises
        ------
        OptionError
        """
        config = self.info.ctx.model_config  # type: ignore[attr-defined]
        table = TABLE_FACTOR * config.hf_text_config.max_position_embeddings
        beyond = sum(max(plan.extent - plan.kept, 0) for plan in plans)
        if max((plan.extent for plan in plans), default=0) > MAX_OFFSET:
            raise OptionError(
                f"one of the media spans more than {MAX_OFFSET} positions; send a shorter video, "
                "or one with a correct frame rate."
            )
        if beyond and config.max_model_len + beyond > table:
            raise OptionError(
                f"the media of this prompt span {beyond} positions more than tokens are left of "
                f"them; with --max-model-len {config.max_model_len} the model's {table} positions "
                "allow less. Send fewer media, or ask for a lower ratio."
            )


class MRopeModel(NoEncoderGraphs, CompressingModel):
    """Model half."""

    needs_offsets: ClassVar[bool] = True
    _pending: tuple[Tensor, Tensor] | None = None

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        limit = vllm_config.model_config.hf_text_config.max_position_embeddings
        lengthen_tables(self, TABLE_FACTOR * limit)  # type: ignore[arg-type]

    @property
    def row_width(self) -> int:
        """Columns of an uncompressed row."""
        return self.language_model.config.hidden_size  # type: ignore[attr-defined]

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
        offsets = torch.from_numpy(grid_offsets(plan.spans[0].grid, factor))
        return with_offsets(rows, offsets[:, index.cpu()])

    # -- when a request arrives -----------------------------------------------------------------

    def item_offsets(self, feature: Any) -> np.ndarray:
        """Offsets (3, n) of the placeholders of an uncompressed item from its base."""
        ((_, t, h, w, factor),) = self.iter_mm_grid_thw([feature])  # type: ignore[attr-defined]
        return grid_offsets((t, h, w), factor)

    def get_mrope_input_positions(self, input_tokens: Any, mm_features: Any) -> tuple[Tensor, int]:
        """Positions (3, n) with every row of a compressed item at its base, and the delta."""
        pieces: list[np.ndarray] = []
        start = position = 0
        for feature in sorted(mm_features, key=lambda f: f.mm_position.offset):
            offset, length = feature.mm_position.offset, feature.mm_position.length
            pieces.append(_text(offset - start, position))
            base, full = position + offset - start, self.item_offsets(feature)
            if length == full.shape[1]:
                pieces.append(base + full)
            elif field_name(feature.modality) in feature.data:
                pieces.append(np.full((3, length), base))
            else:
                raise RuntimeError(f"{length} placeholders for {full.shape[1]} uncompressed tokens")
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
        width = self.row_width
        given = multimodal_embeddings if multimodal_embeddings is not None else ()
        if any(e.shape[1] != width for e in given):
            plain, offsets = [], []
            for e in given:
                plain.append(copy_mm_embedding_modality(e, e[:, :width]))
                offsets.append(
                    unpack_offsets(e[:, width:])
                    if e.shape[1] > width
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
