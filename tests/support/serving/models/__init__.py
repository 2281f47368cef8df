"""Tiny random models as Hugging Face folders, without any download."""

from __future__ import annotations

from support.serving.models.glm4v import glm4v
from support.serving.models.qwen import (
    qwen2_5_vl,
    qwen2_vl,
    qwen3_5,
    qwen3_5_moe,
    qwen3_vl,
    qwen3_vl_moe,
)
from support.serving.models.tiles import internvl, llava, llava_onevision

# Name → function that writes the model into a folder and returns the folder.
BUILDERS = {
    "qwen2_vl": qwen2_vl,
    "qwen2_5_vl": qwen2_5_vl,
    "qwen3_vl": qwen3_vl,
    "qwen3_vl_moe": qwen3_vl_moe,
    "qwen3_5": qwen3_5,
    "qwen3_5_moe": qwen3_5_moe,
    "llava": llava,
    "llava_onevision": llava_onevision,
    "glm4v": glm4v,
    "internvl": internvl,
}
