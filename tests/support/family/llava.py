"""The LLaVA models."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from support.family.base import IMAGE, LONG, SIGLIP, VIDEO, Family, Media


class LlavaOnevision(Family):
    name = "llava_onevision"
    architecture = "LlavaOnevisionForConditionalGeneration"

    def config(self) -> Any:
        return transformers.LlavaOnevisionConfig(
            text_config=transformers.Qwen2Config(**LONG),
            vision_config=transformers.SiglipVisionConfig(**SIGLIP, image_size=16, patch_size=4),
            image_token_id=IMAGE, video_token_id=VIDEO,
            image_grid_pinpoints=[[16, 16], [16, 32], [32, 16], [32, 32]],
            vision_feature_layer=-1, vision_feature_select_strategy="full",
            vision_aspect_ratio="anyres_max_9",
        )  # fmt: skip

    def image(self, size: int = 0) -> Media:
        height, width = [(32, 32), (16, 32), (32, 20)][size]
        tiles = 5 if size != 1 else 3
        # the mosaic is cropped to the image's aspect ratio, then every row gets a line break
        rows, cols = {0: (8, 8), 1: (4, 8), 2: (8, 6)}[size]
        pixels = torch.randn(1, 5, 3, 16, 16)
        pixels[:, tiles:] = 0
        n = 16 + rows * (cols + 1)
        inputs = {"pixel_values": pixels, "image_sizes": torch.tensor([[height, width]])}
        return Media([IMAGE] * n + [7], inputs)

    def video(self, frames: int = 4) -> Media:
        pixels = torch.randn(1, frames, 3, 16, 16)
        return Media([VIDEO] * (frames * 4 + 1) + [7], {"pixel_values_videos": pixels})


def clip(side: int) -> transformers.CLIPVisionConfig:
    """A tower with a class token."""
    return transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        image_size=side, patch_size=4,
    )  # fmt: skip


def llama(kind: type = transformers.LlamaConfig, **more: Any) -> Any:
    """A small config of Llama, or of another text model."""
    return kind(**{**LONG, **more})


class Llava(Family):
    """LLaVA-1.5: CLIP without its class token, Llama."""

    name = "llava"
    architecture = "LlavaForConditionalGeneration"

    def config(self) -> Any:
        return transformers.LlavaConfig(
            vision_config=clip(16), text_config=llama(), image_token_id=IMAGE,
            vision_feature_layer=-2, vision_feature_select_strategy="default",
        )  # fmt: skip

    def image(self, size: int = 0) -> Media:
        return Media([IMAGE] * 16 + [7], {"pixel_values": torch.randn(1, 3, 16, 16)})

    def video(self, frames: int = 4) -> Media:
        """Frames as pictures in one run."""
        pixels = torch.randn(frames, 3, 16, 16)
        return Media([IMAGE] * (16 * frames) + [8], {"pixel_values": pixels})


class LlavaOn(Llava):
    """LLaVA-1.5 on another text model."""

    def __init__(self, kind: type, **options: Any) -> None:
        self.kind, self.options = kind, options

    def config(self) -> Any:
        config = super().config()
        config.text_config = llama(self.kind, **self.options)
        return config


class LlavaNext(LlavaOnevision):
    """Mosaic with line breaks as in LLaVA-OneVision, no pooled videos."""

    name = "llava_next"
    architecture = "LlavaNextForConditionalGeneration"

    def config(self) -> Any:
        return self.config_class()(
            vision_config=clip(16), text_config=llama(), image_token_id=IMAGE,
            image_grid_pinpoints=[[16, 16], [16, 32], [32, 16], [32, 32]],
            vision_feature_layer=-2, vision_feature_select_strategy="default",
        )  # fmt: skip

    def video(self, frames: int = 4) -> Media:
        return self.image(0)


class LlavaNextVideo(LlavaNext):
    """Frames pooled 2×2, side by side."""

    name = "llava_next_video"
    architecture = "LlavaNextVideoForConditionalGeneration"

    def config(self) -> Any:
        config = super().config()
        config.video_token_id = VIDEO
        config.spatial_pool_stride = 2
        return config

    def video(self, frames: int = 4) -> Media:
        pixels = torch.randn(1, frames, 3, 16, 16)
        return Media([VIDEO] * (frames * 4) + [7], {"pixel_values_videos": pixels})
