"""Model code that transformers lacks, built from its stock parts."""

from __future__ import annotations

from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from tokencomp.models.vila.config import VilaConfig
from tokencomp.models.vila.modeling import VilaForConditionalGeneration
from tokencomp.models.vila.processor import VilaProcessor
from tokencomp.models.vila.projector import VilaProjector

__all__ = [
    "VilaConfig",
    "VilaForConditionalGeneration",
    "VilaProcessor",
    "VilaProjector",
    "register_auto_classes",
]


def register_auto_classes() -> None:
    """Let transformers' Auto classes load these models and processors. Safe to call twice."""
    AutoConfig.register(VilaConfig.model_type, VilaConfig, exist_ok=True)
    AutoModelForImageTextToText.register(VilaConfig, VilaForConditionalGeneration, exist_ok=True)
    AutoProcessor.register(VilaConfig, VilaProcessor, exist_ok=True)
