"""Unlimited-OCR: all tokens of the prompt are seen for good, and a window of those that follow."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from support.family.base import IMAGE, TEXT, Family, Media

WINDOW = 5


class UnlimitedOcr(Family):
    """A SAM tower in front of a CLIP tower; every row of an image ends in a line break."""

    name = "unlimited_ocr"
    architecture = "UnlimitedOcrForConditionalGeneration"

    def attention(self, backend: str) -> Any:
        return {"text_config": backend, "vision_config": "eager"}

    def config(self) -> Any:
        return transformers.UnlimitedOcrConfig(
            text_config=dict(
                TEXT, num_key_value_heads=4, moe_intermediate_size=32,
                n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=1,
                mlp_layer_types=["dense", "sparse"] * 2, sliding_window=WINDOW,
            ),
            vision_config=dict(
                sam_config=dict(
                    hidden_size=16, output_channels=16, num_hidden_layers=1, num_attention_heads=2,
                    image_size=64, patch_size=4, window_size=4, global_attn_indexes=[0], mlp_dim=24,
                    downsample_channels=[16, 32], initializer_range=0.02,
                ),
                encoder_config=dict(
                    hidden_size=32, intermediate_size=48, num_hidden_layers=1,
                    num_attention_heads=2, image_size=16, patch_size=4,
                ),
            ),
            image_token_id=IMAGE,
        )  # fmt: skip

    def image(self, size: int = 0) -> Media:
        """Four rows of four tokens and a line break, and a separator."""
        return Media([IMAGE] * 21, {"pixel_values": torch.randn(1, 3, 64, 64)})
