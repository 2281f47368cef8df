"""InternVL3 and 3.5 for vLLM, in both layouts of their checkpoints: tiles, and frames as tiles.

The engine renumbers the tokens without gaps, as for LLaVA-OneVision.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokencomp.serving.item_plan import item_span
from tokencomp.serving.vllm.model import CompressingModel
from tokencomp.serving.vllm.processing import DENSE_TOWER, CompressingProcessor
from tokencomp.tokens.tokens import VisualSpan


class InternVLProcessor(CompressingProcessor):
    """An image is square tiles and a thumbnail in one run; every frame of a video is a tile.

    Text between frames, such as "Frame1: ", stays.
    """

    no_tower_stage = DENSE_TOWER

    def layouts(self, modality: str, items: Any, hf_inputs: Any) -> list[list[VisualSpan]]:
        side = round(self.info.get_hf_processor().image_seq_length ** 0.5)
        tiles = hf_inputs[f"{modality}_num_patches"].tolist()
        return [[item_span(modality, (1, side, side))] * n for n in tiles]


class InternVLModel(CompressingModel):
    """Tiles of all items are concatenated."""

    def pixel_rows(self, kwargs: Mapping[str, Any]) -> list[int]:
        modality = "image" if "image_num_patches" in kwargs else "video"
        return kwargs[f"{modality}_num_patches"].tolist()


MIXINS = {"Model": InternVLModel, "Processor": InternVLProcessor}
