"""VILA from stock parts."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn

from support.family.base import IMAGE, LONG, VIDEO, Family, Media
from tokencomp.models import VilaConfig, VilaForConditionalGeneration

NEWLINE = 9


def siglip() -> transformers.SiglipVisionConfig:
    return transformers.SiglipVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        image_size=28, patch_size=4,
    )  # fmt: skip


def qwen2() -> transformers.Qwen2Config:
    return transformers.Qwen2Config(**LONG)


class Vila(Family):
    """7×7 patches, padded to 8×8, 16 tokens and a separator per image or frame."""

    name = "vila"

    def model_class(self) -> type:
        return VilaForConditionalGeneration

    def config(self) -> Any:
        return VilaConfig(
            text_config=qwen2(), vision_config=siglip(), image_token_id=IMAGE,
            video_token_id=VIDEO, image_ends=([], [NEWLINE]), video_ends=([], [NEWLINE]),
        )  # fmt: skip

    def decoder(self, model: nn.Module) -> nn.Module:
        return model.llm.model

    def image(self, size: int = 0) -> Media:
        n = 1 + size  # tiles
        ids = [*[IMAGE] * 16, NEWLINE] * n
        return Media(ids, {"pixel_values": torch.randn(n, 3, 28, 28)})

    def video(self, frames: int = 4) -> Media:
        ids = [*[VIDEO] * 16, NEWLINE] * frames
        inputs = {
            "pixel_values_videos": torch.randn(frames, 3, 28, 28),
            "video_frames": torch.tensor([frames]),
        }
        return Media(ids, inputs)
