"""Qwen2-VL, Qwen2.5-VL, Qwen3-VL."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from support.family.base import END, ENDS, IDS, IMAGE, LONG, START, TOWER, VIDEO, Family, Media


def text_config() -> dict[str, Any]:
    """The decoder of Qwen2-VL and Qwen2.5-VL, tiny, with M-RoPE."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    return dict(LONG, rope_parameters=rope)


class Qwen2VL(Family):
    name = "qwen2_vl"
    architecture = "Qwen2VLForConditionalGeneration"
    mrope = True

    def config(self) -> Any:
        return transformers.Qwen2VLConfig(
            text_config=text_config(),
            vision_config=dict(
                depth=1, embed_dim=32, hidden_size=64, num_heads=2, mlp_ratio=2, patch_size=4,
                temporal_patch_size=2, spatial_merge_size=2, in_channels=3,
            ),
            **IDS, **ENDS,
        )  # fmt: skip

    def _media(self, grid: tuple[int, int, int], token: int, prefix: str) -> Media:
        t, h, w = grid
        pixels = torch.randn(t * h * w, 96)
        suffix = "" if prefix == "image" else "_videos"
        inputs = {f"pixel_values{suffix}": pixels, f"{prefix}_grid_thw": torch.tensor([grid])}
        return Media([START] + [token] * (t * h * w // 4) + [END], inputs)

    def image(self, size: int = 0) -> Media:
        return self._media([(1, 8, 8), (1, 4, 8), (1, 6, 10)][size], IMAGE, "image")

    def video(self, frames: int = 4) -> Media:
        return self.whole_video(frames)

    def two_images(self) -> Media:
        return self.image(1).beside(self.image(1))

    def whole_video(self, frames: int) -> Media:
        return self._media((frames // 2, 4, 8), VIDEO, "video")


class Qwen25VL(Qwen2VL):
    """Window attention in the tower, seconds in the temporal positions."""

    name = "qwen2_5_vl"
    architecture = "Qwen2_5_VLForConditionalGeneration"

    def config(self) -> Any:
        return transformers.Qwen2_5_VLConfig(
            text_config=text_config(),
            vision_config=dict(
                TOWER, window_size=16, fullatt_block_indexes=[1], tokens_per_second=2,
            ),
            **IDS, **ENDS,
        )  # fmt: skip

    def whole_video(self, frames: int) -> Media:
        media = super().whole_video(frames)
        media.inputs["second_per_grid_ts"] = torch.tensor([2.0])
        return media


class Qwen3VL(Qwen2VL):
    """Deepstack features, a timestamp before every frame."""

    name = "qwen3_vl"
    architecture = "Qwen3VLForConditionalGeneration"
    deepstack: tuple[int, ...] = (0,)

    def text_config(self) -> dict[str, Any]:
        rope = dict(text_config()["rope_parameters"], mrope_interleaved=True)
        return dict(LONG, head_dim=16, rope_parameters=rope)

    def config(self) -> Any:
        return self.config_class()(
            text_config=self.text_config(),
            vision_config=dict(
                TOWER, depth=3, num_position_embeddings=64,
                deepstack_visual_indexes=list(self.deepstack),
            ),
            **IDS, **ENDS,
        )  # fmt: skip

    def whole_video(self, frames: int) -> Media:
        media = self._media((frames // 2, 4, 8), VIDEO, "video")
        ids: list[int] = []
        for t in range(frames // 2):  # <t seconds> start, frame, end
            ids += [140, 141 + t, 144, START, *[VIDEO] * 8, END]
        return Media(ids, media.inputs)


class Qwen3VLMoe(Qwen3VL):
    """Mixture-of-experts layers in the same decoder."""

    name = "qwen3_vl_moe"
    architecture = "Qwen3VLMoeForConditionalGeneration"

    def text_config(self) -> dict[str, Any]:
        experts = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
        return {**super().text_config(), **experts}
