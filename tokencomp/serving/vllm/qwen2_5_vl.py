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

from tokencomp.serving.vllm.mrope import MRopeModel
from tokencomp.serving.vllm.qwen2_vl import GridProcessor


class Qwen2_5_VLProcessor(GridProcessor, Qwen2_5_VLMultiModalProcessor):
    """vLLM's processor with shortened placeholders."""


@MULTIMODAL_REGISTRY.register_processor(
    Qwen2_5_VLProcessor, info=Qwen2_5_VLProcessingInfo, dummy_inputs=Qwen2_5_VLDummyInputsBuilder
)
class TokencompQwen2_5_VL(MRopeModel, Qwen2_5_VLForConditionalGeneration):
    """vLLM's Qwen2.5-VL with compressed media."""

    def t_factor(self, kwargs: Mapping[str, Any], item: int) -> float:
        per_second = getattr(self.config.vision_config, "tokens_per_second", 1.0)
        seconds = kwargs.get("second_per_grid_ts")
        return per_second * (1.0 if seconds is None else float(seconds[item]))
