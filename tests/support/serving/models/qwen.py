"""Tiny random Qwen2-VL, Qwen2.5-VL, Qwen3-VL and Qwen3.5, with embedded tokenizer and prompts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers as hf

from recipes.tiny.export import export
from recipes.tiny.families import family
from recipes.tiny.tokenizer import load_tokenizer, write_tokenizer
from support.serving.models.building import DECODER, PIXELS, TOWER, sharpen, write, write_weights
from tokencomp.storage import write_json


def qwen2_vl(folder: Path) -> Path:
    """Write the embedded Qwen2-VL with random weights."""
    torch.manual_seed(0)
    spec = family("tiny-qwen2-vl")
    write_tokenizer(folder, spec.chat_template)
    return export(sharpen(spec.build(load_tokenizer(folder))), spec, folder)


def qwen2_5_vl(folder: Path) -> Path:
    """Write Qwen2.5-VL in the same size, with a windowed vision tower and times between frames."""
    base = qwen2_vl(folder)
    config = json.loads((base / "config.json").read_text())
    vision = config["vision_config"]
    config["architectures"] = ["Qwen2_5_VLForConditionalGeneration"]
    config["model_type"] = "qwen2_5_vl"
    config["vision_config"] = {
        "model_type": "qwen2_5_vl",
        "depth": 2,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_heads": 2,
        "out_hidden_size": config["hidden_size"],
        "in_channels": 3,
        "in_chans": 3,
        "hidden_act": "silu",
        "patch_size": vision["patch_size"],
        "spatial_patch_size": vision["patch_size"],
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "tokens_per_second": 2,
        "window_size": 112,
        "fullatt_block_indexes": [1],
    }
    write_json(base / "config.json", config)
    processor = base / "preprocessor_config.json"
    values = json.loads(processor.read_text())
    write_json(processor, {**values, "processor_class": "Qwen2_5_VLProcessor"})
    torch.manual_seed(1)
    model = sharpen(hf.Qwen2_5_VLForConditionalGeneration(hf.Qwen2_5_VLConfig(**config)))
    names = (("model.visual.", "visual."), ("model.language_model.", "model."))
    weights = {}
    for name, tensor in model.state_dict().items():
        for old, new in names:
            name = name.replace(old, new)
        weights[name] = tensor.half()
    write_weights(weights, base)
    return base


def qwen3_vl(folder: Path, experts: int = 0) -> Path:
    """Write Qwen3-VL with two deepstack levels and a timestamp before every pair of frames.

    With `experts` the model is the MoE variant.
    """
    base = qwen2_vl(folder)
    old = json.loads((base / "config.json").read_text())
    section = {"mrope_section": [8, 12, 12], "mrope_interleaved": True}
    text: dict[str, Any] = dict(
        **DECODER, vocab_size=old["vocab_size"], head_dim=64,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6, **section},
        eos_token_id=old["eos_token_id"], pad_token_id=old["pad_token_id"],
    )  # fmt: skip
    if experts:
        text.update(
            num_experts=experts,
            num_experts_per_tok=2,
            moe_intermediate_size=96,
            norm_topk_prob=True,
        )
    levels = {"depth": 3, "deepstack_visual_indexes": [0, 1]}
    vision = {**TOWER, **levels, "num_position_embeddings": 256}
    name = "Qwen3VLMoe" if experts else "Qwen3VL"
    tokens = {k: old[k] for k in old if k.endswith("_token_id") and k.split("_")[0] not in "eospad"}
    config = getattr(hf, name + "Config")(text_config=text, vision_config=vision, **tokens)
    torch.manual_seed(0)
    model = sharpen(getattr(hf, name + "ForConditionalGeneration")(config)).half()
    weights = {  # published checkpoints store the experts transposed
        n: x.transpose(1, 2) if ".experts." in n else x for n, x in model.state_dict().items()
    }
    write(model, weights, base)
    for file in ("preprocessor_config.json", "video_preprocessor_config.json"):
        values = json.loads((base / file).read_text())
        values = {k: v for k, v in values.items() if k not in ("min_pixels", "max_pixels")}
        values.update(processor_class="Qwen3VLProcessor", size=PIXELS)
        if file.startswith("video"):
            values["video_processor_type"] = "Qwen3VLVideoProcessor"
        write_json(base / file, values)
    return base


def qwen3_5(folder: Path, experts: int = 0) -> Path:
    """Write Qwen3.5: three layers with linear attention for one with full attention.

    With `experts` the model is the MoE variant. Prompts are those of Qwen3-VL.
    """
    base = qwen3_vl(folder)
    old = json.loads((base / "config.json").read_text())
    tokens = {k: old[k] for k in old if k.endswith("_token_id")}
    section = {"mrope_section": [3, 3, 2], "mrope_interleaved": True}
    text: dict[str, Any] = dict(
        **DECODER, vocab_size=old["text_config"]["vocab_size"], head_dim=64,
        linear_key_head_dim=64, linear_value_head_dim=64, linear_num_key_heads=2,
        linear_num_value_heads=2,
        rope_parameters={
            "rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.25, **section,
        },
    )  # fmt: skip
    if experts:
        text.update(
            num_experts=experts, num_experts_per_tok=2, moe_intermediate_size=96,
            shared_expert_intermediate_size=96,
        )  # fmt: skip
    vision = {**TOWER, "num_position_embeddings": 256}
    name = "Qwen3_5Moe" if experts else "Qwen3_5"
    config = getattr(hf, name + "Config")(text_config=text, vision_config=vision, **tokens)
    torch.manual_seed(0)
    model = sharpen(getattr(hf, name + "ForConditionalGeneration")(config)).half()
    model.lm_head.weight.data.mul_(16)  # so that compression changes more than bfloat16 does
    write(model, model.state_dict(), base)
    return base


def qwen3_5_moe(folder: Path) -> Path:
    """Write Qwen3.5-MoE with four experts."""
    return qwen3_5(folder, experts=4)


def qwen3_vl_moe(folder: Path) -> Path:
    """Write Qwen3-VL-MoE with four experts."""
    return qwen3_vl(folder, experts=4)
