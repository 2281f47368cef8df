"""Models that the structural adapter serves, with real tiny towers."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from support.family.audio import Qwen3OmniThinker, Qwen25OmniThinker
from support.family.base import END, ENDS, IDS, IMAGE, LONG, START, TOWER, VIDEO, Family, Media
from support.family.mistral import Mistral3
from support.family.qwen import Qwen2VL, text_config
from tokencomp.adapters.verified import verified_types


class Glm4v(Qwen2VL):
    """Frames of a video stand at placeholders of images, with timestamps between them."""

    name = "glm4v"
    architecture = "Glm4vForConditionalGeneration"

    def config(self) -> Any:
        return transformers.Glm4vConfig(
            text_config=dict(text_config(), head_dim=16),
            vision_config=dict(TOWER, image_size=32),
            image_start_token_id=START, image_end_token_id=END, video_start_token_id=156,
            video_end_token_id=157, **IDS,
        )  # fmt: skip

    def video(self, frames: int = 4) -> Media:
        return self.two_images()

    def whole_video(self, frames: int) -> Media:
        media = self._media((frames // 2, 4, 8), IMAGE, "video")
        ids = [156]
        for t in range(frames // 2):
            ids += [START, *[IMAGE] * 8, END, 141 + t]
        return Media([*ids, 157], media.inputs)


class PaddleOcr(Qwen2VL):
    """A SigLIP tower on patches of several images, with M-RoPE behind it."""

    name = "paddleocr_vl"
    architecture = "PaddleOCRVLForConditionalGeneration"

    def config(self) -> Any:
        return transformers.PaddleOCRVLConfig(
            text_config=dict(text_config(), head_dim=16),
            vision_config=dict(
                hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
                image_size=32, patch_size=4, spatial_merge_size=2,
            ),
            **IDS, **ENDS,
        )  # fmt: skip

    def _media(self, grid: tuple[int, int, int], token: int, prefix: str) -> Media:
        media = super()._media(grid, token, prefix)
        t, h, w = grid
        media.inputs["pixel_values"] = torch.randn(t * h * w, 3, 4, 4)
        return media

    def video(self, frames: int = 4) -> Media:
        return self.two_images()


class KimiK25(Family):
    """Latent attention; the size of an image reaches the encoder alone."""

    name = "kimi_k25"
    architecture = "Kimi_K25ForConditionalGeneration"

    def config(self) -> Any:
        text = dict(
            LONG, head_dim=16, model_type="deepseek_v3", num_key_value_heads=4, kv_lora_rank=16,
            q_lora_rank=16, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=16, n_group=1,
            topk_group=1, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=32,
            first_k_dense_replace=1, n_shared_experts=1,
        )  # fmt: skip
        return transformers.Kimi_K25Config(
            text_config=text,
            vision_config=dict(
                hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
                patch_size=4, pos_emb_height=8, pos_emb_width=8,
            ),
            projection_hidden_size=32, **IDS, **ENDS,
        )  # fmt: skip

    def image(self, size: int = 0) -> Media:
        h, w = [(8, 8), (4, 8), (6, 10)][size]
        inputs = {
            "pixel_values": torch.randn(h * w, 3, 4, 4),
            "image_grid_thw": torch.tensor([[1, h, w]]),
        }
        return Media([START] + [IMAGE] * (h * w // 4) + [END], inputs)

    def video(self, frames: int = 4) -> Media:
        """Two images side by side in one run."""
        return self.image(1).beside(self.image(2), shared=1)

    def whole_video(self, frames: int) -> Media:
        """Frames are merged by twos; a time stands before every two."""
        ids, count = [], frames // 2
        for t in range(count):
            ids += [141 + t, START, *[VIDEO] * 8, END]
        inputs = {
            "pixel_values_videos": torch.randn(count * 64, 3, 4, 4),
            "video_grid_thw": torch.tensor([[2, 4, 8]] * count),
        }
        return Media(ids, inputs)


class FastVLM(Family):
    """A convolutional tower, whose feature map tells the grid. FastViT itself needs timm."""

    name = "fast_vlm"
    architecture = "FastVlmForConditionalGeneration"

    def attention(self, backend: str) -> Any:
        return {"text_config": backend, "vision_config": "eager"}

    def config(self) -> Any:
        tower = transformers.ResNetConfig(
            num_channels=3, embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1],
            layer_type="basic",
        )  # fmt: skip
        tower.hidden_size = 32
        return transformers.FastVlmConfig(
            text_config=transformers.Qwen2Config(**LONG),
            vision_config=tower, image_token_id=IMAGE,
        )  # fmt: skip

    def image(self, size: int = 0) -> Media:
        """Eight pixels a token; images of one batch have one size."""
        return Media([START, *[IMAGE] * 24, END], {"pixel_values": torch.randn(1, 3, 32, 48)})

    def video(self, frames: int = 4) -> Media:
        """Two images side by side in one run."""
        return self.image().beside(self.image(), shared=1)


STRUCTURAL: dict[str, Family] = {
    f.name: f
    for f in (
        Glm4v(),
        PaddleOcr(),
        KimiK25(),
        Mistral3(),
        Qwen25OmniThinker(),
        Qwen3OmniThinker(),
        FastVLM(),
    )
    if f.name in verified_types()
}
