"""M-RoPE with data-dependent selection, exact in any dtype and without support by the engine.

The engine needs positions before the vision tower runs, when the kept tokens are not known yet.
Only the positions of kept tokens depend on the choice: text and later media keep the positions that
follow the full grid. The engine therefore gets exact positions of text, and the base position for
all rows of a compressed item. Each kept row carries its (t, h, w) offsets from that base in extra
columns, as digits to the base 256 (bfloat16 represents integers up to 255 exactly), and `forward`
adds them to the positions.
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

MAX_OFFSET = 65535  # two digits to the base 256
TABLE_FACTOR = 4  # rotary tables have this many times the model's positions


def pack_offsets(offsets: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert offsets (3, k) from 0 to 65535 to digits (k, 6), which are exact in `dtype`."""
    if offsets.numel() and not 0 <= int(offsets.min()) <= int(offsets.max()) <= MAX_OFFSET:
        raise RuntimeError(f"position offsets up to {int(offsets.max())} do not fit 16 bits.")
    return torch.cat([offsets >> 8, offsets & 255]).T.to(dtype)


def with_offsets(rows: Tensor, offsets: Tensor) -> Tensor:
    """Append the digits of offsets (3, k) to rows (k, d) as six columns."""
    return torch.cat([rows, pack_offsets(offsets, rows.dtype).to(rows.device)], dim=1)


def unpack_offsets(digits: Tensor) -> Tensor:
    """Convert digits (k, 6) to offsets (3, k), int64."""
    high, low = digits.float().round().long().T.chunk(2)
    return high * 256 + low


def grid_offsets(grid: tuple[int, int, int], t_factor: float) -> np.ndarray:
    """Return the offsets (3, t·h·w) of a grid from its base position.

    Frames are `t_factor` positions apart, truncated to integers as in the model.
    """
    offsets = np.indices(grid).reshape(3, -1)
    if t_factor != 1.0:
        offsets[0] = (offsets[0] * t_factor).astype(np.int64)
    return offsets


def lengthen_tables(model: nn.Module, length: int) -> None:
    """Extend all rotary tables of a model to positions below `length`; old entries do not change.

    Positions can exceed the prompt's length, because kept tokens keep their original positions.
    """
    for table in {m for m in model.modules() if isinstance(m, MRotaryEmbedding)}:
        old = table.cos_sin_cache
        if old.shape[0] >= length:
            continue
        # The engine's own method would scale YaRN's frequencies to the new length.
        inv_freq = table._compute_inv_freq(table.scaling_factor or table.base)
        angles = torch.arange(old.shape[0], length, dtype=torch.float)[:, None] * inv_freq
        more = torch.cat([angles.cos(), angles.sin()], dim=-1) * table.mscale
        table.cos_sin_cache = torch.cat([old, more.to(old)])


def _text(n: int, first: int) -> np.ndarray:
    """Return the positions (3, n) of text tokens, which are equal in all three rows."""
    return np.broadcast_to(np.arange(first, first + n), (3, n))


def grid_extent(grid: tuple[int, int, int], t_factor: float = 1.0) -> int:
    """Return the distance from the base of a grid to the position of the next token."""
    t, h, w = grid
    return max(int((t - 1) * t_factor) + 1, h, w)


class MRopeProcessor(CompressingProcessor):
    """Processor of M-RoPE models, in which every item is one t × h × w grid.

    A compressed item keeps the extent of its full grid in positions.
    """

    def layouts(self, modality: str, items: Any, hf_inputs: Any) -> list[list[Layout]]:
        """See `CompressingProcessor.layouts`."""
        merge = self.info.get_hf_config().vision_config.spatial_merge_size  # type: ignore[attr-defined]
        grids = hf_inputs[f"{modality}_grid_thw"].tolist()
        return [[Layout((t, h // merge, w // merge))] for t, h, w in grids]

    def extents(self, modality: str, layouts: Any, hf_inputs: Any) -> list[int]:
        """See `CompressingProcessor.extents`."""
        return [grid_extent(spans[0].grid) for spans in layouts]

    def check_positions(self, plans: list[ItemPlan]) -> None:
        """Refuse requests whose positions exceed the rotary tables.

        Positions exceed the prompt's length if a long grid keeps few of its tokens.

        Raises
        ------
        OptionError
            If an item spans more than 65535 positions, or all items together exceed the tables.
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
                f"the media of this prompt span {beyond} positions more than they have kept "
                f"tokens; with --max-model-len {config.max_model_len} the model's {table} "
                "positions allow less. Send fewer media, or request a lower ratio."
            )


class MRopeModel(NoEncoderGraphs, CompressingModel):
    """Model with M-RoPE, which adds the offsets of kept tokens to their base positions."""

    needs_offsets: ClassVar[bool] = True
    _pending: tuple[Tensor, Tensor] | None = None

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        limit = vllm_config.model_config.hf_text_config.max_position_embeddings
        lengthen_tables(self, TABLE_FACTOR * limit)  # type: ignore[arg-type]

    @property
    def row_width(self) -> int:
        """Number of columns of an uncompressed row."""
        return self.language_model.config.hidden_size  # type: ignore[attr-defined]

    # -- in the vision step ---------------------------------------------------------------------

    def slice_items(self, kwargs: Mapping[str, Any], first: int, stop: int) -> dict[str, Any]:
        """Return the inputs of a range of items, whose pixels are concatenated over all items."""
        kind = "image" if "image_grid_thw" in kwargs else "video"
        sizes = kwargs[f"{kind}_grid_thw"].prod(-1).tolist()
        start, end = sum(sizes[:first]), sum(sizes[:stop])
        return {
            name: value[start:end] if name.startswith("pixel_values") else value[first:stop]
            for name, value in kwargs.items()
        }

    def t_factor(self, kwargs: Mapping[str, Any], item: int) -> float:
        """Return the number of positions between two frames of an item of a batch."""
        return 1.0

    def finish_item(
        self, plan: ItemPlan, rows: Tensor, index: Tensor, kwargs: Mapping[str, Any], item: int
    ) -> Tensor:
        """Append the offsets of the kept rows; an item that kept all rows needs none."""
        if rows.shape[0] == plan.full:
            return rows
        factor = self.t_factor(kwargs, item) if plan.kind == "video" else 1.0
        offsets = torch.from_numpy(grid_offsets(plan.spans[0].grid, factor))
        return with_offsets(rows, offsets[:, index.cpu()])

    # -- when a request arrives -----------------------------------------------------------------

    def item_offsets(self, feature: Any) -> np.ndarray:
        """Return the offsets (3, n) of an uncompressed item's placeholders from its base."""
        ((_, t, h, w, factor),) = self.iter_mm_grid_thw([feature])  # type: ignore[attr-defined]
        return grid_offsets((t, h, w), factor)

    def get_mrope_input_positions(self, input_tokens: Any, mm_features: Any) -> tuple[Tensor, int]:
        """Return positions (3, n) of a prompt and the delta of its generated tokens.

        All rows of a compressed item are at its base position until `forward` adds their offsets.
        The delta is the next position minus the number of tokens.
        """
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
        """Remove the offset columns from the media rows and store them for `forward`."""
        self._pending = None
        width = self.row_width
        embeddings = multimodal_embeddings if multimodal_embeddings is not None else ()
        if any(e.shape[1] != width for e in embeddings):
            plain, offsets = [], []
            for e in embeddings:
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
        """Add the stored offsets to the positions and run the model.

        The addition is in place, because CUDA graphs read the engine's own position buffer.
        """
        if self._pending is not None:
            rows, offsets = self._pending
            self._pending = None
            positions[:, rows.to(positions.device)] += offsets.to(positions)
        return super().forward(input_ids, positions, *args, **kwargs)  # type: ignore[misc]
