"""The processor of M-RoPE models: grids, extents, and positions that the rotary tables hold."""

from __future__ import annotations

from typing import Any

from tokencomp.errors import OptionError
from tokencomp.serving.item_plan import ItemSize, item_span
from tokencomp.serving.offsets import MAX_OFFSET, grid_extent
from tokencomp.serving.vllm.processing import CompressingProcessor
from tokencomp.tokens.spans import VisualSpan

TABLE_FACTOR = 4  # rotary tables have this many times the model's positions


class Processor(CompressingProcessor):
    """Processor of M-RoPE models, in which every item is one t × h × w grid.

    A compressed item keeps the extent of its full grid in positions.
    """

    def layouts(self, modality: str, items: Any, hf_inputs: Any) -> list[list[VisualSpan]]:
        """See `CompressingProcessor.layouts`."""
        merge = self.info.get_hf_config().vision_config.spatial_merge_size  # type: ignore[attr-defined]  # of vLLM's class
        grids = hf_inputs[f"{modality}_grid_thw"].tolist()
        return [[item_span(modality, (t, h // merge, w // merge))] for t, h, w in grids]

    def extents(self, modality: str, layouts: Any, hf_inputs: Any) -> list[int]:
        """See `CompressingProcessor.extents`."""
        return [grid_extent(spans[0].grid) for spans in layouts]

    def check_positions(self, sizes: list[ItemSize]) -> None:
        """Refuse requests whose positions exceed the rotary tables.

        Positions exceed the prompt's length if a long grid keeps few of its tokens.
        """
        config = self.info.ctx.model_config  # type: ignore[attr-defined]  # of vLLM's class
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
