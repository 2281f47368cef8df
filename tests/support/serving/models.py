"""Tiny random models as Hugging Face folders, and media for them, without any download."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

SHARPER = 2.5


def _sharpen(model: torch.nn.Module) -> torch.nn.Module:
    """Scale the random weights, whose attention is otherwise too flat to reveal mistakes."""
    with torch.no_grad():
        for parameter in model.model.language_model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(SHARPER)
    return model


def qwen2_vl(folder: Path) -> Path:
    """Write the zoo's Qwen2-VL with random weights."""
    from tokencomp.zoo.export import export
    from tokencomp.zoo.families import family
    from tokencomp.zoo.tokenizer import load_tokenizer, write_tokenizer

    torch.manual_seed(0)
    spec = family("tiny-qwen2-vl")
    write_tokenizer(folder, spec.chat_template)
    return export(_sharpen(spec.build(load_tokenizer(folder))), spec, folder)


def qwen2_vl_overflow(folder: Path) -> Path:
    """Write `qwen2_vl` with a vision tower that gives infinite features, as overflow does."""
    from safetensors.torch import load_file, save_file

    file = qwen2_vl(folder) / "model.safetensors"
    weights = load_file(file)
    (name,) = (n for n in weights if n.endswith("merger.mlp.2.bias"))
    weights[name][0] = torch.inf
    save_file(weights, file, metadata={"format": "pt"})
    return folder


def qwen2_5_vl(folder: Path) -> Path:
    """Write Qwen2.5-VL in the same size, with a windowed vision tower and times between frames."""
    from safetensors.torch import save_file
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    from tokencomp.storage import write_json

    base = qwen2_vl(folder)
    config = json.loads((base / "config.json").read_text())
    vision = config["vision_config"]
    config["architectures"], config["model_type"] = (
        ["Qwen2_5_VLForConditionalGeneration"],
        "qwen2_5_vl",
    )
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
    for name in ("preprocessor_config.json",):
        values = json.loads((base / name).read_text())
        write_json(base / name, {**values, "processor_class": "Qwen2_5_VLProcessor"})
    torch.manual_seed(1)
    model = _sharpen(Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**config)))
    names = (("model.visual.", "visual."), ("model.language_model.", "model."))
    weights = {}
    for name, tensor in model.state_dict().items():
        for old, new in names:
            name = name.replace(old, new)
        weights[name] = tensor.half().contiguous()
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    return base


def qwen3_vl(folder: Path, experts: int = 0) -> Path:
    """Write Qwen3-VL with two deepstack levels and a timestamp before every pair of frames.

    With `experts` the model is the MoE variant.
    """
    import transformers
    from safetensors.torch import save_file

    from tokencomp.storage import write_json

    base = qwen2_vl(folder)
    old = json.loads((base / "config.json").read_text())
    section = {"mrope_section": [8, 12, 12], "mrope_interleaved": True}
    text: dict[str, Any] = dict(
        vocab_size=old["vocab_size"], hidden_size=128, intermediate_size=256, num_hidden_layers=4,
        num_attention_heads=2, num_key_value_heads=2, head_dim=64, max_position_embeddings=8192,
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
    vision = dict(
        depth=3, hidden_size=64, intermediate_size=128, num_heads=2, out_hidden_size=128,
        patch_size=14, spatial_merge_size=2, temporal_patch_size=2, in_channels=3,
        num_position_embeddings=256, deepstack_visual_indexes=[0, 1],
    )  # fmt: skip
    name = "Qwen3VLMoe" if experts else "Qwen3VL"
    tokens = {k: old[k] for k in old if k.endswith("_token_id") and k.split("_")[0] not in "eospad"}
    config = getattr(transformers, name + "Config")(
        text_config=text, vision_config=vision, **tokens
    )
    torch.manual_seed(0)
    model = _sharpen(getattr(transformers, name + "ForConditionalGeneration")(config)).half()
    config.architectures = [type(model).__name__]
    config.save_pretrained(base)
    weights = {  # published checkpoints store the experts transposed
        n: (x.transpose(1, 2) if ".experts." in n else x).contiguous()
        for n, x in model.state_dict().items()
    }
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    size = {"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 4096}
    for file in ("preprocessor_config.json", "video_preprocessor_config.json"):
        values = json.loads((base / file).read_text())
        values = {k: v for k, v in values.items() if k not in ("min_pixels", "max_pixels")}
        values.update(processor_class="Qwen3VLProcessor", size=size)
        if file.startswith("video"):
            values["video_processor_type"] = "Qwen3VLVideoProcessor"
        write_json(base / file, values)
    return base


def qwen3_5(folder: Path, experts: int = 0) -> Path:
    """Write Qwen3.5: three layers with linear attention for one with full attention.

    With `experts` the model is the MoE variant. Prompts are those of Qwen3-VL.
    """
    import transformers
    from safetensors.torch import save_file

    base = qwen3_vl(folder)
    old = json.loads((base / "config.json").read_text())
    tokens = {k: old[k] for k in old if k.endswith("_token_id")}
    section = {"mrope_section": [3, 3, 2], "mrope_interleaved": True}
    text: dict[str, Any] = dict(
        vocab_size=old["text_config"]["vocab_size"], hidden_size=128, intermediate_size=256,
        num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=2, head_dim=64,
        linear_key_head_dim=64, linear_value_head_dim=64, linear_num_key_heads=2,
        linear_num_value_heads=2, max_position_embeddings=8192,
        rope_parameters={
            "rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.25, **section,
        },
    )  # fmt: skip
    if experts:
        text.update(
            num_experts=experts, num_experts_per_tok=2, moe_intermediate_size=96,
            shared_expert_intermediate_size=96,
        )  # fmt: skip
    vision = dict(
        depth=2, hidden_size=64, intermediate_size=128, num_heads=2, out_hidden_size=128,
        patch_size=14, spatial_merge_size=2, temporal_patch_size=2, in_channels=3,
        num_position_embeddings=256,
    )  # fmt: skip
    name = "Qwen3_5Moe" if experts else "Qwen3_5"
    config = getattr(transformers, name + "Config")(
        text_config=text, vision_config=vision, **tokens
    )
    torch.manual_seed(0)
    model = _sharpen(getattr(transformers, name + "ForConditionalGeneration")(config)).half()
    model.lm_head.weight.data.mul_(16)  # so that compression changes more than bfloat16 does
    config.architectures = [type(model).__name__]
    config.save_pretrained(base)
    weights = {n: x.contiguous() for n, x in model.state_dict().items()}
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    return base


def qwen3_5_moe(folder: Path) -> Path:
    """Write Qwen3.5-MoE with four experts."""
    return qwen3_5(folder, experts=4)


def qwen3_vl_moe(folder: Path) -> Path:
    """Write Qwen3-VL-MoE with four experts."""
    return qwen3_vl(folder, experts=4)


def llava_onevision(folder: Path) -> Path:
    """Write LLaVA-OneVision with 8 × 8 tokens per tile under the published parameter names."""
    from safetensors.torch import save_file
    from transformers import (
        LlavaOnevisionConfig,
        LlavaOnevisionForConditionalGeneration,
        LlavaOnevisionImageProcessor,
        LlavaOnevisionProcessor,
        LlavaOnevisionVideoProcessor,
        Qwen2Config,
        SiglipVisionConfig,
    )

    from tokencomp.zoo.tokenizer import load_tokenizer, write_tokenizer

    template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
        "{% if m['content'] is string %}{{ m['content'] }}{% else %}"
        "{% for p in m['content'] %}{% if p['type'] in ('image', 'image_url') %}<image>"
        "{% elif p['type'] == 'video' %}<video>{% elif 'text' in p %}{{ p['text'] }}{% endif %}"
        "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    write_tokenizer(folder, template)
    tokenizer = load_tokenizer(folder)
    tokenizer.image_token, tokenizer.video_token = "<image>", "<video>"
    ids = {t: tokenizer.convert_tokens_to_ids(t) for t in ("<image>", "<video>", "<|im_end|>")}
    side, patch = 112, 14
    pins = [[side * i, side * j] for i in range(1, 4) for j in range(1, 4)]
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(
            hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
            image_size=side, patch_size=patch, vision_use_head=False,
        ).to_dict(),
        text_config=Qwen2Config(
            vocab_size=(len(tokenizer) + 63) // 64 * 64, hidden_size=128, intermediate_size=256,
            num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=2,
            max_position_embeddings=8192, rope_theta=1e6, tie_word_embeddings=False,
            eos_token_id=ids["<|im_end|>"],
        ).to_dict(),
        image_token_index=ids["<image>"], video_token_index=ids["<video>"],
        vision_feature_select_strategy="full", vision_feature_layer=-1,
        vision_aspect_ratio="anyres_max_9", image_grid_pinpoints=pins, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = _sharpen(LlavaOnevisionForConditionalGeneration(config))
    torch.nn.init.normal_(model.model.image_newline)
    config.architectures = ["LlavaOnevisionForConditionalGeneration"]
    config.save_pretrained(folder)
    save_file(_published(model), folder / "model.safetensors", metadata={"format": "pt"})
    size = {"height": side, "width": side}
    LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=pins),
        tokenizer=tokenizer,
        video_processor=LlavaOnevisionVideoProcessor(size=size, do_sample_frames=False),
        num_image_tokens=(side // patch) ** 2,
        vision_feature_select_strategy="full",
        chat_template=template,
        image_token="<image>",
        video_token="<video>",
        vision_aspect_ratio="anyres_max_9",
    ).save_pretrained(folder)
    return folder


def glm4v(folder: Path) -> Path:
    """Write GLM-4.1V, whose video frames have a second behind each of them."""
    import transformers as hf

    from tokencomp.zoo.tokenizer import load_tokenizer, write_tokenizer

    write_tokenizer(folder, "")
    marks = [f"<|{edge}_of_{kind}|>" for kind in ("image", "video") for edge in ("begin", "end")]
    tokenizer = load_tokenizer(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": [*marks, "<|image|>", "<|video|>"]})
    tokenizer.save_pretrained(folder)
    ids = dict(zip(marks, tokenizer.convert_tokens_to_ids(marks), strict=True))
    config = hf.Glm4vConfig(
        text_config=dict(
            vocab_size=(len(tokenizer) + 63) // 64 * 64, hidden_size=128, intermediate_size=256,
            num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=2,
            max_position_embeddings=8192,
            rope_parameters={
                "rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6],
                "partial_rotary_factor": 0.5,
            },
        ),
        vision_config=dict(
            depth=2, hidden_size=64, intermediate_size=128, num_heads=2, out_hidden_size=128,
            patch_size=14, image_size=112, spatial_merge_size=2, temporal_patch_size=2,
        ),
        image_token_id=tokenizer.convert_tokens_to_ids("<|image|>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<|video|>"),
        image_start_token_id=ids[marks[0]], image_end_token_id=ids[marks[1]],
        video_start_token_id=ids[marks[2]], video_end_token_id=ids[marks[3]],
    )  # fmt: skip
    torch.manual_seed(0)
    model = _sharpen(hf.Glm4vForConditionalGeneration(config)).half()
    config.architectures = ["Glm4vForConditionalGeneration"]
    config.save_pretrained(folder)
    model.save_pretrained(folder)
    size = {"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 4096}
    hf.Glm4vProcessor(
        hf.Glm4vImageProcessor(size=size), tokenizer, hf.Glm4vVideoProcessor(size=size)
    ).save_pretrained(folder)
    return folder


def internvl(folder: Path) -> Path:
    """Write InternVL with 4 × 4 tokens per tile, at most 4 tiles and a thumbnail."""
    import transformers as hf

    from tokencomp.zoo.tokenizer import load_tokenizer, write_tokenizer

    write_tokenizer(folder, "")
    names = {
        "start_image_token": "<img>", "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>", "video_token": "<video>",
    }  # fmt: skip
    tokenizer = load_tokenizer(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": sorted(names.values())})
    tokenizer.save_pretrained(folder)
    tokenizer = hf.AutoTokenizer.from_pretrained(folder, extra_special_tokens=names)
    size, pixels, patch = {"height": 112, "width": 112}, [112, 112], 14
    config = hf.InternVLConfig(
        text_config=hf.Qwen2Config(
            vocab_size=(len(tokenizer) + 63) // 64 * 64, hidden_size=128, intermediate_size=256,
            num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=2,
            max_position_embeddings=8192, tie_word_embeddings=False,
        ),
        vision_config=hf.InternVLVisionConfig(
            hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
            image_size=pixels, patch_size=[patch, patch], use_mean_pooling=True,
        ),
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        downsample_ratio=0.5, image_seq_length=16, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = _sharpen(hf.InternVLForConditionalGeneration(config)).half()
    config.architectures = ["InternVLForConditionalGeneration"]
    config.save_pretrained(folder)
    model.save_pretrained(folder)
    images = hf.GotOcr2ImageProcessor(size=size, crop_to_patches=True, min_patches=1, max_patches=4)
    videos = hf.InternVLVideoProcessor(size=size, do_sample_frames=False)
    hf.InternVLProcessor(images, tokenizer, videos, image_seq_length=16).save_pretrained(folder)
    return folder


def _published(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the weights in half precision under the names of published checkpoints."""
    weights = {}
    for name, tensor in model.state_dict().items():
        name = name.replace("lm_head.", "language_model.lm_head.")
        name = name.replace("model.language_model.", "language_model.model.")
        name = name.replace("model.vision_tower.", "vision_tower.")
        if name.startswith("vision_tower.") and "vision_model" not in name:
            name = name.replace("vision_tower.", "vision_tower.vision_model.")
        name = name.removeprefix("model.")
        weights[name] = tensor.half().contiguous()
    return weights


BUILDERS = {
    "qwen2_vl": qwen2_vl,
    "qwen2_vl_overflow": qwen2_vl_overflow,
    "qwen2_5_vl": qwen2_5_vl,
    "qwen3_vl": qwen3_vl,
    "qwen3_vl_moe": qwen3_vl_moe,
    "qwen3_5": qwen3_5,
    "qwen3_5_moe": qwen3_5_moe,
    "llava_onevision": llava_onevision,
    "glm4v": glm4v,
    "internvl": internvl,
}


def image(seed: int, width: int = 224, height: int = 224) -> Image.Image:
    """Return an image of blocks of 14 px in random colours."""
    blocks = np.random.RandomState(seed).rand(max(height // 14, 1), max(width // 14, 1), 3)
    return Image.fromarray((blocks * 255).astype("uint8")).resize((width, height), Image.NEAREST)


def video(seed: int, frames: int = 8, width: int = 112, height: int = 84) -> np.ndarray:
    """Return uint8 frames (frames, height, width, 3), each a random image."""
    return np.stack([np.asarray(image(seed * 1000 + i, width, height)) for i in range(frames)])


FPS = 1.0


def metadata(frames: int) -> dict[str, Any]:
    """Return the metadata that a video loader reports for `frames` frames at `FPS`."""
    return {
        "fps": FPS,
        "total_num_frames": frames,
        "duration": frames / FPS,
        "frames_indices": list(range(frames)),
        "video_backend": "tests",
        "do_sample_frames": False,
    }


def media(descriptions: list[list[Any]]) -> dict[str, list[Any]]:
    """Return images and videos from `[["image", seed, w, h], ["video", seed, frames, w, h]]`.

    A description may have the path of a file instead of the numbers.
    """
    result: dict[str, list[Any]] = {}
    for kind, *numbers in descriptions:
        if isinstance(numbers[0], str):
            result.setdefault(kind, []).append(_from_file(numbers[0]))
        else:
            result.setdefault(kind, []).append((image if kind == "image" else video)(*numbers))
    return result


def _from_file(path: str) -> Any:
    """Load an image, or a video as an array of 8 frames."""
    from tokencomp.inputs.media import load_media

    loaded = load_media(path, 8)
    return np.stack([np.asarray(f) for f in loaded]) if isinstance(loaded, list) else loaded
