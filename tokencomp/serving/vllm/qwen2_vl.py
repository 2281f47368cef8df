"""Qwen2-VL for vLLM with compressed media."""

from __future__ import annotations

from vllm.model_executor.models.qwen2_vl import (
    Qwen2VLDummyInputsBuilder,
    Qwen2VLForConditionalGeneration,
    Qwen2VLMultiModalProcessor,
    Qwen2VLProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from tokencomp.serving.vllm.mrope import MRopeModel, MRopeProcessor


class Qwen2VLProcessor(MRopeProcessor, Qwen2VLMultiModalProcessor):
    """vLLM's processor with fewer placeholders for compressed media."""


@MULTIMODAL_REGISTRY.register_processor(
    Qwen2VLProcessor, info=Qwen2VLProcessingInfo, dummy_inputs=Qwen2VLDummyInputsBuilder
)
class TokencompQwen2VL(MRopeModel, Qwen2VLForConditionalGeneration):
    """vLLM's Qwen2-VL with compressed media."""
