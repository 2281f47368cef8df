"""M-RoPE with data-dependent selection, exact in any dtype and without support by the engine.

The engine needs positions before the vision tower runs, when the kept tokens are not known yet.
Only the positions of kept tokens depend on the choice: text and later media keep the positions that
follow the full grid. The engine therefore gets exact positions of text, and the base position for
all rows of a compressed item. Each kept row carries its (t, h, w) offsets from that base in extra
columns (see `offsets`). Model runner V2 adds them before the forward pass (see `runner_v2`), and
under V1 `forward` adds them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.rotary_embedding.mrope import MRotaryEmbedding

from tokencomp.errors import OptionError
from tokencomp.serving.item_plan import ItemPlan, ItemSize, field_name, item_span
from tokencomp.serving.offsets import MAX_OFFSET, OFFSETS, grid_extent, grid_offsets, with_offsets
from tokencomp.serving.vllm.model import STAGE, CompressingModel
from tokencomp.serving.vllm.processing import CompressingProcessor
from tokencomp.tokens.tokens import VisualSpan

TABLE_FACTOR = 4  # rotary tables have this many times the model's positions


def time_factor(config: Any, modality: str, inputs: Mapping[str, Any], item: int) -> float:
    """Positions between two frames of an item; other than 1 in videos of Qwen2.5-VL."""
    if modality == "image":
        return 1.0
    per_second = getattr(config.vision_config, "tokens_per_second", 1.0)
    seconds = inputs.get("second_per_grid_ts")
    return float(per_second * (1.0 if seconds is None else float(seconds[item])))


class MRopeProcessor(CompressingProcessor):
    """Every item is one t × h × w grid, whose extent in positions a compressed item keeps."""

    def layouts(self, modality: str, items: Any, hf_inputs: Any) -> list[list[VisualSpan]]:
        merge = self.info.get_hf_config().vision_config.spatial_merge_size
        grids = hf_inputs[f"{modality}_grid_thw"].tolist()
        return [[item_span(modality, (t, h // merge, w // merge))] for t, h, w in grids]

    def extents(self, modality: str, layouts: Any, hf_inputs: Any) -> list[int]:
        config = self.info.get_hf_config()
        return [
            grid_extent(spans[0].grid, time_factor(config, modality, hf_inputs, i))
            for i, spans in enumerate(layouts)
        ]

    def needs_pixels(self, modality: str) -> str:
        """Frames of Qwen2.5-VL are some seconds apart, which encoders of vLLM do not report."""
        timed = hasattr(self.info.get_hf_config().vision_config, "tokens_per_second")
        if modality == "image" or not timed:
            return ""
        return "positions of its frames depend on seconds, which an encoder does not hand on"

    def check_positions(self, sizes: list[ItemSize]) -> None:
        """Refuse positions beyond the rotary tables: grids that keep few tokens are long."""
        config = self.info.ctx.model_config
        table = TABLE_FACTOR * config.hf_text_config.max_position_embeddings
        beyond = sum(max(size.extent - size.kept, 0) for size in sizes)
        if max((size.extent for size in sizes), default=0) > MAX_OFFSET:
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


def _text(n: int, first: int) -> np.ndarray:
    """Positions (3, n) of text tokens, equal in all three rows."""
    return np.broadcast_to(np.arange(first, first + n), (3, n))


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


class MRopeModel(CompressingModel):
    """Model with M-RoPE, which adds the offsets of kept tokens to their base positions."""

    config: Any
    language_model: Any
    needs_offsets: ClassVar[bool] = True

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self._vllm_config = vllm_config
        limit = vllm_config.model_config.hf_text_config.max_position_embeddings
        lengthen_tables(self, TABLE_FACTOR * limit)  # type: ignore[arg-type]  # a module

    # -- in the vision step ---------------------------------------------------------------------

    def pixel_rows(self, kwargs: Mapping[str, Any]) -> list[int]:
        modality = "image" if "image_grid_thw" in kwargs else "video"
        return kwargs[f"{modality}_grid_thw"].prod(-1).tolist()

    def finish_item(
        self, plan: ItemPlan, rows: Tensor, index: Tensor, kwargs: Mapping[str, Any], item: int
    ) -> Tensor:
        """Append the offsets of the kept rows; an item that kept all rows needs none."""
        if rows.shape[0] == plan.full:
            return rows
        return with_offsets(rows, self.kept_offsets(plan, index.cpu(), kwargs, item))

    def kept_offsets(
        self, plan: ItemPlan, index: Tensor, kwargs: Mapping[str, Any], item: int
    ) -> Tensor:
        """The offsets (3, k) of kept patches, whose numbers in the item are `index` (k,)."""
        factor = time_factor(self.config, plan.modality, kwargs, item)
        return torch.from_numpy(grid_offsets(plan.spans[0].grid, factor))[:, index]

    # -- when a request arrives -----------------------------------------------------------------

    def full_offsets(self, feature: Any) -> np.ndarray:
        """Return the offsets (3, n) of an uncompressed item's placeholders from its base."""
        ((_, t, h, w, factor),) = self.iter_mm_grid_thw([feature])  # type: ignore[attr-defined]  # of vLLM's class
        return grid_offsets((t, h, w), factor)

    def item_offsets(self, feature: Any) -> tuple[np.ndarray, int]:
        """Offsets (3, length) of an item's tokens from its base, and distance of the next token.

        Those of the rows of a compressed item are added after the vision tower has run.
        """
        full, length = self.full_offsets(feature), feature.mm_position.length
        extent = int(full.max()) + 1
        if length == full.shape[1]:
            return full, extent
        if field_name(feature.modality) not in feature.data:
            raise RuntimeError(f"{length} placeholders for {full.shape[1]} uncompressed tokens")
        return np.zeros((3, length), dtype=np.int64), extent

    def get_mrope_input_positions(self, input_tokens: Any, mm_features: Any) -> tuple[Tensor, int]:
        """Return positions (3, n) of a prompt, and the next position minus the number of tokens.

        All rows of a compressed item are at its base position until their offsets are added.
        """
        pieces: list[np.ndarray] = []
        start = position = 0
        # Text t, an item of extent 4 with 2 kept rows (r), text:
        #     tokens     t0 t1  r  r  t2 t3
        #     positions   0  1  2  2   6  7      rows at the base 2, until their offsets are added
        for feature in sorted(mm_features, key=lambda f: f.mm_position.offset):
            text = feature.mm_position.offset - start
            pieces.append(_text(text, position))
            offsets, extent = self.item_offsets(feature)
            pieces.append(position + text + offsets)
            position, start = position + text + extent, start + text + feature.mm_position.length
        rest = len(input_tokens) - start
        pieces.append(_text(rest, position))
        positions = np.concatenate(pieces, axis=1).astype(np.int64)
        return torch.from_numpy(positions), position + rest - len(input_tokens)

    # -- in every step, model runner V2 ---------------------------------------------------------

    def get_model_state_cls(self) -> type:
        """Return the state class that vLLM would choose, with corrected positions."""
        from vllm.v1.worker.gpu.model_states import resolve_model_state_cls

        from tokencomp.serving.vllm.runner_v2 import state_with_offsets

        chosen = resolve_model_state_cls(self._vllm_config, self.language_model)
        return state_with_offsets(chosen)

    def recompute_mrope_positions(
        self,
        input_ids: Any,
        multimodal_embeddings: Any,
        mrope_positions: Tensor,
        num_computed_tokens: int,
    ) -> tuple[list[Tensor], Tensor, None]:
        """Add the offsets of a request's media rows to its positions.

        `multimodal_embeddings` are the media rows (k, d) or with further columns (`offsets`) of the
        tokens from `num_computed_tokens` on, in order; `mrope_positions` are those of the whole
        prompt (3, n). Returns rows without offset columns (those of sizes stay for
        `embed_input_ids`), positions, and None for the delta, which `BasePositions` keeps.
        """
        width, first, rows = self.row_width, 0, multimodal_embeddings
        if any(e.shape[1] >= width + OFFSETS for e in rows):
            ids = torch.as_tensor(input_ids, device=mrope_positions.device)[num_computed_tokens:]
            # Every row belongs to a placeholder. Placeholders of later windows follow these rows.
            media = ids.new_tensor([self.config.image_token_id, self.config.video_token_id])
            places = num_computed_tokens + torch.isin(ids, media).nonzero()[:, 0]
            mrope_positions, rows = mrope_positions.clone(), []
            for e in multimodal_embeddings:
                plain, offsets = self.media_rows(e)
                mrope_positions[:, places[first : first + len(e)]] += offsets.to(mrope_positions)
                rows.append(plain)
                first += len(e)
        return list(rows), mrope_positions, None

    # -- in every step, model runner V1 ---------------------------------------------------------

    def stage_rows(self, positions: Tensor) -> dict[str, Tensor]:
        """Also the corrected positions (n, 3), while later stages have the base only."""
        rows = super().stage_rows(positions)
        return {**rows, STAGE.format("positions"): positions.T.contiguous()}

    def take_stage_rows(self, given: Mapping[str, Tensor], positions: Tensor) -> None:
        super().take_stage_rows(given, positions)
        positions.copy_(given[STAGE.format("positions")].T)

    def forward(self, input_ids: Any, positions: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Add the stored offsets to the positions and run the model.

        The addition is in place, because CUDA graphs read the engine's own position buffer. Under
        V2 nothing is stored, as `recompute_mrope_positions` removed the columns.
        """
        if self._pending is not None:
            rows, offsets = self._pending
            self._pending = None
            positions[:, rows.to(positions.device)] += offsets.to(positions)
        return super().forward(input_ids, positions, *args, **kwargs)


MIXINS = {"Model": MRopeModel, "Processor": MRopeProcessor}
