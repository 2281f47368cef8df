"""The vLLM plugin: out-of-tree model classes, no change to the engine.

The entry point `vllm.general_plugins: tokencomp` calls `register` in every engine process. Each
class is a subclass of vLLM's own model with a processor that emits fewer placeholders, and an
`embed_multimodal` that returns as many rows.
"""

from __future__ import annotations

import os

ENV_OPTIONS = "TOKENCOMP_SERVING"
ENV_OFF = "TOKENCOMP_VLLM"
ENV_UNTESTED = "TOKENCOMP_ALLOW_UNTESTED"
TESTED_VERSIONS = ("0.32",)

MODELS = {
    "LlavaOnevisionForConditionalGeneration": "llava_onevision:TokencompLlavaOnevision",
    "Qwen2VLForConditionalGeneration": "qwen2_vl:TokencompQwen2VL",
    "Qwen2_5_VLForConditionalGeneration": "qwen2_5_vl:TokencompQwen2_5_VL",
}


def enabled() -> bool:
    """False if the environment says `TOKENCOMP_VLLM=off`."""
    return os.environ.get(ENV_OFF, "").lower() not in ("off", "0", "false", "no")


def register() -> None:
    """Replace the served architectures in vLLM's registry. Safe to call many times."""
    if not enabled():
        return
    from vllm import ModelRegistry

    for architecture, target in MODELS.items():
        ModelRegistry.register_model(architecture, f"{__name__}.{target}")
