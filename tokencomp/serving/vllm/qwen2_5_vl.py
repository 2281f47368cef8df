"""Qwen2.5-VL for vLLM, whose frames have distances in time."""

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
    """Return the positions between two frames of a video; `inputs` are the processor's outputs."""
    per_second = getattr(vision_config, "tokens_per_second", 1.0)
    seconds = inputs.get("second_per_grid_ts")
    return per_second * (1.0 if seconds is None else float(seconds[item]))


class Qwen2_5_VLProcessor(MRopeProcessor, Qwen2_5_VLMultiModalProcessor):
    """vLLM's processor with fewer placeholders for compressed media."""

    def extents(self, modality: str, layouts: Any, hf_inputs: Any) -> list[int]:
        """See `CompressingProcessor.extents`."""
        if modality == "image":
            return super().extents(modality, layouts, hf_inputs)
        # Only videos have times between their frames.
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
        """See `MRopeModel.t_factor`."""
        return time_factor(self.config.vision_config, kwargs, item)
