"""Random-weight Qwen2.5-VL of a size that a CPU can serve: timing needs shapes, not knowledge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

TOWER = {
    "depth": 4, "hidden_size": 256, "intermediate_size": 512, "num_heads": 4,
    "window_size": 112, "fullatt_block_indexes": [1, 3],
}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "3b": {
        "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "vision_config": {
            "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16,
            "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31],
        },
    }
}  # fmt: skip
"""Sizes of published models, Qwen2.5-VL-3B's with heads of 128 dimensions."""


def build(folder: Path, hidden: int = 512, layers: int = 8, shape: str | None = None) -> Path:
    """Write a Qwen2.5-VL folder with the embedded models' tokenizer and processors.

    `shape` is one of `SHAPES`; without it heads have 64 dimensions and the tower is small.
    """
    from safetensors.torch import save_file
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    from recipes.tiny.families import family
    from recipes.tiny.tokenizer import load_tokenizer, write_tokenizer
    from tokencomp.storage import write_json

    recipe = family("tiny-qwen2-vl")
    write_tokenizer(folder, recipe.chat_template)
    tokenizer = load_tokenizer(folder)
    for name, values in recipe.files(tokenizer).items():
        write_json(folder / name, values)
    config = recipe.config(tokenizer)
    sizes: dict[str, Any] = {
        "hidden_size": hidden, "intermediate_size": hidden * 38 // 7, "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64, "vision_config": TOWER,
        "rope_scaling": {"type": "mrope", "mrope_section": [8, 12, 12]},
        **(SHAPES[shape] if shape else {}),
    }  # fmt: skip
    tower = {
        "model_type": "qwen2_5_vl", "out_hidden_size": sizes["hidden_size"], "in_channels": 3,
        "in_chans": 3, "hidden_act": "silu", "patch_size": 14, "spatial_patch_size": 14,
        "spatial_merge_size": 2, "temporal_patch_size": 2, "tokens_per_second": 2,
        **sizes["vision_config"],
    }  # fmt: skip
    config.update(
        architectures=["Qwen2_5_VLForConditionalGeneration"], model_type="qwen2_5_vl",
        num_key_value_heads=2, **{**sizes, "vision_config": tower},
    )  # fmt: skip
    write_json(folder / "config.json", config)
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**config))
    weights = {}
    for name, tensor in model.state_dict().items():
        name = name.replace("model.visual.", "visual.").replace("model.language_model.", "model.")
        weights[name] = tensor.to(torch.bfloat16).contiguous()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
