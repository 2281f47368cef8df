"""Mistral 3 with Pixtral: every row of an image ends in a token of its own."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from support.family.base import END, IMAGE, TEXT, Family, Media

BREAK = 154


class Mistral3(Family):
    """Queries are scaled by their position, which the layers read from `position_ids`."""

    name = "mistral3"
    architecture = "Mistral3ForConditionalGeneration"

    def config(self) -> Any:
        rope = {
            "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "beta_fast": 32.0,
            "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1,
            "original_max_position_embeddings": 16,
        }  # fmt: skip
        return transformers.Mistral3Config(
            text_config=transformers.Ministral3Config(
                **TEXT, head_dim=16, sliding_window=None, rope_parameters=rope
            ),
            vision_config=transformers.PixtralVisionConfig(
                hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
                image_size=64, patch_size=4,
            ),
            image_token_id=IMAGE, spatial_merge_size=2, vision_feature_layer=-1,
        )  # fmt: skip

    def image(self, size: int = 0) -> Media:
        rows, cols = [(4, 6), (2, 3), (5, 2)][size]
        pixels = torch.zeros(1, 3, 64, 64)
        pixels[..., : 8 * rows, : 8 * cols] = torch.randn(1, 3, 8 * rows, 8 * cols)
        ids = [*[IMAGE] * cols, BREAK] * rows
        ids[-1] = END
        sizes = torch.tensor([[8 * rows, 8 * cols]])
        return Media(ids, {"pixel_values": pixels, "image_sizes": sizes})

    def video(self, frames: int = 4) -> Media:
        return self.image(1).beside(self.image(2))
