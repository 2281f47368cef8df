"""A tiny random GLM-4.1V."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers as hf

from support.serving.models.building import (
    DECODER,
    PIXELS,
    TOWER,
    sharpen,
    tokenizer_with,
    vocabulary,
)


def glm4v(folder: Path) -> Path:
    """Write GLM-4.1V, whose prompts have the time of every video frame behind it."""
    marks = [f"<|{edge}_of_{kind}|>" for kind in ("image", "video") for edge in ("begin", "end")]
    tokenizer = tokenizer_with(folder, [*marks, "<|image|>", "<|video|>"])
    ids = dict(zip(marks, tokenizer.convert_tokens_to_ids(marks), strict=True))
    rope = {
        "rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6],
        "partial_rotary_factor": 0.5,
    }  # fmt: skip
    config = hf.Glm4vConfig(
        text_config={**DECODER, "vocab_size": vocabulary(tokenizer), "rope_parameters": rope},
        vision_config={**TOWER, "image_size": 112},
        image_token_id=tokenizer.convert_tokens_to_ids("<|image|>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<|video|>"),
        image_start_token_id=ids[marks[0]], image_end_token_id=ids[marks[1]],
        video_start_token_id=ids[marks[2]], video_end_token_id=ids[marks[3]],
    )  # fmt: skip
    torch.manual_seed(0)
    model = sharpen(hf.Glm4vForConditionalGeneration(config)).half()
    model.save_pretrained(folder)
    images, videos = hf.Glm4vImageProcessor(size=PIXELS), hf.Glm4vVideoProcessor(size=PIXELS)
    hf.Glm4vProcessor(images, tokenizer, videos).save_pretrained(folder)
    return folder
