"""Inkling: a bias by the distance of tokens in place of rotary positions, and convolutions."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from support.family.base import IMAGE, TEXT, Family, Media


class Inkling(Family):
    """Windows and biases that end inside of short prompts; a patch becomes a token by itself."""

    name = "inkling_mm_model"
    architecture = "InklingForConditionalGeneration"

    def config(self) -> Any:
        return transformers.InklingConfig(
            text_config=dict(
                TEXT, head_dim=16, swa_num_attention_heads=4, swa_num_key_value_heads=4,
                swa_head_dim=16, sliding_window_size=8, rel_extent=12, d_rel=8, n_shared_experts=1,
                moe_intermediate_size=32, n_routed_experts=4, num_experts_per_tok=2,
                layer_types=["hybrid_sliding", "hybrid"] * 2,
                mlp_layer_types=["dense", "sparse"] * 2, logits_mup_width_multiplier=1.0,
            ),
            vision_config=dict(patch_size=4, hidden_size=32, num_hidden_layers=4),
            audio_config=dict(n_mel_bins=8, mel_vocab_size=16),
            image_token_id=IMAGE, audio_token_id=155, image_bos_token_id=152,
            audio_bos_token_id=156,
        )  # fmt: skip

    def image(self, size: int = 0) -> Media:
        """Two frames of 4 × 4 pixels a token."""
        count = (16, 8, 6)[size]
        return Media([152, *[IMAGE] * count], {"pixel_values": torch.randn(count, 2, 4, 4, 3)})
