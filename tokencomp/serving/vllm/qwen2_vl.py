"""Qwen2-VL for vLLM."""

from __future__ import annotations

from typing import Any

from vllm.model_executor.models.qwen2_vl import (
    Qwen2VLDummyInputsBuilder,
    Qwen2VLForConditionalGeneration,
    Qwen2VLMultiModalProcessor,
    Qwen2VLProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from tokencomp.serving.items import Layout
from tokencomp.serving.vllm.mrope import MRopeModel
from tokencomp.serving.vllm.processing import CompressingProcessor


class GridProcessor(CompressingProcessor):
    """Every item is one t × h × w grid, named by the processor."""

    def layouts(self, modality: str, items: Any, hf_inputs: Any) -> list[list[Layout]]:
        merge = self.info.get_hf_config().vision_config.spatial_merge_size  # type: ignore[attr-defined]
        grids = hf_inputs[f"{modality}_grid_thw"].tolist()
        return [[Layout((t, h // merge, w // merge))] for t, h, w in grids]


class Qwen2VLProcessor(GridProcessor, Qwen2VLMultiModalProcessor):
    """vLLM's processor with shortened placeholders."""


@MULTIMODAL_REGISTRY.register_processor(
    Qwen2VLProcessor, info=Qwen2VLProcessingInfo, dummy_inputs=Qwen2VLDummyInputsBuilder
)
class TokencompQwen2VL(MRopeModel, Qwen2VLForConditionalGeneration):
    """vLLM's Qwen2-VL with compressed media."""
