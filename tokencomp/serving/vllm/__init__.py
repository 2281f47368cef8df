"""The vLLM plugin, which registers model classes and leaves the engine unchanged.

The entry point `vllm.general_plugins: tokencomp` calls `register` in every engine process. Without
an option of tokencomp, vLLM then builds its own model and processor (see `entry`): nothing changes
and nothing is refused, on any version. With options, the model is a subclass of vLLM's own class.
Its processor emits fewer placeholders, and its `embed_multimodal` returns as many rows. The
resolved options, and the content of trained weights, are part of the media hash, so prefix and
encoder caches never mix ratios. docs/engines.md says what was tested, and what is
refused.
"""

from __future__ import annotations

import contextlib
import os
from importlib import import_module
from typing import Any

from tokencomp.serving import ENV_RULES
from tokencomp.serving.vllm import process

ENV_OFF = "TOKENCOMP_VLLM"
LOADER = "tokencomp"  # name of `frames.ChosenFrames` among vLLM's loaders of videos
PIXELS = "pixels"  # its option for the pixels that the other media of a request leave
TESTED_VERSIONS = ("0.32", "0.33", "0.34")

# Architecture → the module of this package whose `MIXINS` extend vLLM's model and processor.
MODELS = {
    "Glm4vForConditionalGeneration": "glm4v",
    "Glm4vMoeForConditionalGeneration": "glm4v",
    "InternVLChatModel": "internvl",
    "InternVLForConditionalGeneration": "internvl",
    "LlavaOnevisionForConditionalGeneration": "llava_onevision",
    "Qwen2VLForConditionalGeneration": "mrope",
    "Qwen2_5_VLForConditionalGeneration": "mrope",
    "Qwen3_5ForConditionalGeneration": "qwen3_vl",
    "Qwen3_5MoeForConditionalGeneration": "qwen3_vl",
    "Qwen3VLForConditionalGeneration": "qwen3_vl",
    "Qwen3VLMoeForConditionalGeneration": "qwen3_vl",
}
# Architectures that cannot merge with weights, and why.
_HYBRID = (
    "its layers of linear attention have no keys, and share pages of the cache with wider heads"
)
NO_MERGING = {
    "Qwen3_5ForConditionalGeneration": _HYBRID,
    "Qwen3_5MoeForConditionalGeneration": _HYBRID,
}
STOCK: dict[str, Any] = {}  # what vLLM's registry had for these architectures


def register() -> None:
    """Put the classes of `entry` and `frames` into vLLM's registries. Repeated calls are harmless.

    The names of the classes contain vLLM's version, because vLLM stores what it learns about a
    class under its name and the hash of our file, and an update of vLLM changes neither.
    """
    if os.environ.get(ENV_OFF, "").lower() in ("off", "0", "false", "no"):
        return
    if ENV_RULES in os.environ:  # a process of `tokencomp serve`
        process.end_with_parent()
        process.remove_metrics_at_exit()
        import_module("tokencomp.serving.connections").bound_engine()
    import vllm

    registry = vllm.ModelRegistry
    entry = f"{__name__}.entry"
    for architecture in MODELS:
        stock = registry.models.get(architecture)
        if stock is None or getattr(stock, "module_name", "") == entry:
            continue  # this vLLM has no such model, or the class is registered already
        STOCK[architecture] = stock
        registry.register_model(architecture, f"{entry}:{architecture}__{vllm.__version__}")
    with contextlib.suppress(ImportError, AttributeError):  # another version of vLLM
        import_module(f"{__name__}.frames")
