"""Tiny random LLaVA, and LLaVA-OneVision and InternVL, which cut images into tiles."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers as hf

from recipes.tiny.tokenizer import load_tokenizer, write_tokenizer
from support.serving.models.building import (
    DECODER,
    TILE_TOWER,
    sharpen,
    tokenizer_with,
    vocabulary,
    write,
)
from tokencomp.storage import write_json

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for p in m['content'] %}{% if p['type'] in ('image', 'image_url') %}<image>"
    "{% elif p['type'] == 'video' %}<video>{% elif 'text' in p %}{{ p['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def llava(folder: Path) -> Path:
    """Write LLaVA with 8 × 8 tokens per image, and a config in the words of published ones."""
    write_tokenizer(folder, TEMPLATE)
    tokenizer = load_tokenizer(folder)
    tokenizer.image_token, side, patch = "<image>", 112, 14
    text = hf.LlamaConfig(
        **DECODER, vocab_size=vocabulary(tokenizer), tie_word_embeddings=False,
        eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"),
    )  # fmt: skip
    tower = hf.CLIPVisionConfig(**TILE_TOWER, image_size=side, patch_size=patch, projection_dim=64)
    config = hf.LlavaConfig(
        vision_config=tower.to_dict(), text_config=text.to_dict(), tie_word_embeddings=False,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )  # fmt: skip
    torch.manual_seed(0)
    model = sharpen(hf.LlavaForConditionalGeneration(config))
    write(model, _published(model), folder)
    written = json.loads((folder / "config.json").read_text())
    rope = written["text_config"].pop("rope_parameters")
    written["text_config"]["rope_theta"] = rope["rope_theta"]
    write_json(folder / "config.json", written)
    size = {"height": side, "width": side}
    hf.LlavaProcessor(
        image_processor=hf.CLIPImageProcessor(size=size, crop_size=size),
        tokenizer=tokenizer,
        patch_size=patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
        image_token="<image>",
    ).save_pretrained(folder)
    return folder


def llava_onevision(folder: Path) -> Path:
    """Write LLaVA-OneVision with 8 × 8 tokens per tile under the published parameter names."""
    write_tokenizer(folder, TEMPLATE)
    tokenizer = load_tokenizer(folder)
    tokenizer.image_token, tokenizer.video_token = "<image>", "<video>"
    ids = {t: tokenizer.convert_tokens_to_ids(t) for t in ("<image>", "<video>", "<|im_end|>")}
    side, patch = 112, 14
    pins = [[side * i, side * j] for i in range(1, 4) for j in range(1, 4)]
    config = hf.LlavaOnevisionConfig(
        vision_config=hf.SiglipVisionConfig(
            **TILE_TOWER, image_size=side, patch_size=patch, vision_use_head=False
        ).to_dict(),
        text_config=hf.Qwen2Config(
            **DECODER, vocab_size=vocabulary(tokenizer), rope_theta=1e6, tie_word_embeddings=False,
            eos_token_id=ids["<|im_end|>"],
        ).to_dict(),
        image_token_index=ids["<image>"], video_token_index=ids["<video>"],
        vision_feature_select_strategy="full", vision_feature_layer=-1,
        vision_aspect_ratio="anyres_max_9", image_grid_pinpoints=pins, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = sharpen(hf.LlavaOnevisionForConditionalGeneration(config))
    torch.nn.init.normal_(model.model.image_newline)
    write(model, _published(model), folder)
    size = {"height": side, "width": side}
    hf.LlavaOnevisionProcessor(
        image_processor=hf.LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=pins),
        tokenizer=tokenizer,
        video_processor=hf.LlavaOnevisionVideoProcessor(size=size, do_sample_frames=False),
        num_image_tokens=(side // patch) ** 2,
        vision_feature_select_strategy="full",
        chat_template=TEMPLATE,
        image_token="<image>",
        video_token="<video>",
        vision_aspect_ratio="anyres_max_9",
    ).save_pretrained(folder)
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
        weights[name] = tensor.half()
    return weights


def internvl(folder: Path) -> Path:
    """Write InternVL with 4 × 4 tokens per tile, at most 4 tiles and a thumbnail."""
    names = {
        "start_image_token": "<img>", "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>", "video_token": "<video>",
    }  # fmt: skip
    tokenizer_with(folder, sorted(names.values()))
    tokenizer = hf.AutoTokenizer.from_pretrained(folder, extra_special_tokens=names)
    size, pixels, patch = {"height": 112, "width": 112}, [112, 112], 14
    config = hf.InternVLConfig(
        text_config=hf.Qwen2Config(
            **DECODER, vocab_size=vocabulary(tokenizer), tie_word_embeddings=False
        ),
        vision_config=hf.InternVLVisionConfig(
            **TILE_TOWER, image_size=pixels, patch_size=[patch, patch], use_mean_pooling=True,
        ),
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        downsample_ratio=0.5, image_seq_length=16, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = sharpen(hf.InternVLForConditionalGeneration(config)).half()
    model.save_pretrained(folder)
    images = hf.GotOcr2ImageProcessor(size=size, crop_to_patches=True, min_patches=1, max_patches=4)
    videos = hf.InternVLVideoProcessor(size=size, do_sample_frames=False)
    hf.InternVLProcessor(images, tokenizer, videos, image_seq_length=16).save_pretrained(folder)
    return folder
