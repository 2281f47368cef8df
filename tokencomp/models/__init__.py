"""Model code that transformers lacks, built from its stock parts."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_LAZY = {
    "VilaConfig": "tokencomp.models.vila.config",
    "VilaForConditionalGeneration": "tokencomp.models.vila.modeling",
    "VilaProcessor": "tokencomp.models.vila.processor",
    "VilaProjector": "tokencomp.models.vila.projector",
}

__all__ = [
    "VilaConfig",
    "VilaForConditionalGeneration",
    "VilaProcessor",
    "VilaProjector",
    "register_auto_classes",
]

if TYPE_CHECKING:
    from tokencomp.models.vila.config import VilaConfig
    from tokencomp.models.vila.modeling import VilaForConditionalGeneration
    from tokencomp.models.vila.processor import VilaProcessor
    from tokencomp.models.vila.projector import VilaProjector


def register_auto_classes() -> None:
    """Let transformers' Auto classes load these models and processors. Safe to call twice."""
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    from tokencomp.models.vila.config import VilaConfig
    from tokencomp.models.vila.modeling import VilaForConditionalGeneration
    from tokencomp.models.vila.processor import VilaProcessor

    AutoConfig.register(VilaConfig.model_type, VilaConfig, exist_ok=True)
    AutoModelForImageTextToText.register(VilaConfig, VilaForConditionalGeneration, exist_ok=True)
    AutoProcessor.register(VilaConfig, VilaProcessor, exist_ok=True)


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'tokencomp.models' has no attribute {name!r}")
