"""The processor of M-RoPE models: grids, extents, and positions that the rotary tables hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokencomp.errors import OptionError
from tokencomp.serving.item_plan import ItemSize, item_span
from tokencomp.serving.offsets import MAX_OFFSET, grid_extent
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
