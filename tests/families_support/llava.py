"""The LLaVA models."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from families_support.base import EOS, IMAGE, PAD, VIDEO, VOCAB, Family, Media


class LlavaOnevision(Family):
    name = "llava_onevision"

    def model_class(self) -> type:
        return transformers.LlavaOnevisionForConditionalGeneration

    def config(self) -> Any:
        return transformers.LlavaOnevisionConfig(
            text_config=transformers.Qwen2Config(
                vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=4,
                num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048,
                bos_token_id=1, eos_token_id=EOS, pad_token_id=PAD,
            ),
            vision_config=transformers.SiglipVisionConfig(
                hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
                image_size=16, patch_size=4,
            ),
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
