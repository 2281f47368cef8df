"""Qwen2.5-VL for vLLM: as Qwen2-VL, with frames apart in time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm.model_executor.models.qwen2_5_vl import (
    Qwen2_5_VLDummyInputsBuilder,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLMultiModalProcessor,
    Qwen2_5_VLProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from tokencomp.serving.vllm.mrope import MRopeModel, MRopeProcessor, grid_extent


def time_factor(vision_config: Any, inputs: Mapping[str, Any], item: int) -> float:
    """Positions between two frames of a video; `inputs` is what the processor made of it."""
    per_second = getattr(vision_config, "tokens_per_second", 1.0)
    seconds = inputs.get("second_per_grid_ts")
    return per_second * (1.0 if seconds is None else float(seconds[item]))


class Qwen2_5_VLProcessor(MRopeProcessor, Qwen2_5_VLMultiModalProcessor):
    """vLLM's processor with shortened placeholders."""

    def extents(self, modality: str, layouts: Any, hf_inputs: Any) -> list[int]:
        if modality == "image":
            return super().extents(modality, layouts, hf_inputs)
        config = self.info.get_hf_config().vision_config
        return [
            grid_extent(spans[0].grid, time_factor(config, hf_inputs, i))
            for i, spans in enumerate(layouts)
        ]


@MULTIMODAL_REGISTRY.register_processor(
    Qwen2_5_VLProcessor, info=Qwen2_5_VLProcessingInfo, dummy_inputs=Qwen2_5_VLDummyInputsBuilder
)
class TokencompQwen2_5_VL(MRopeModel, Qwen2_5_VLForConditionalGeneration):
    """vLLM's Qwen2.5-VL with compressed media."""

    def t_factor(self, kwargs: Mapping[str, Any], item: int) -> float:
        return time_factor(self.config.vision_config, kwargs, item)
