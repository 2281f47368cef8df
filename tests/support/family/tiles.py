"""InternVL, SmolVLM and Idefics3: square tiles."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn

from support.family.base import END, IMAGE, LONG, PAD, SIGLIP, START, Family, Media


class InternVL(Family):
    """Tiles and a thumbnail in one run; frames with "Frame1: " between them."""

    name = "internvl"
    architecture = "InternVLForConditionalGeneration"

    def config(self) -> Any:
        return transformers.InternVLConfig(
            text_config=transformers.Qwen2Config(**LONG),
            vision_config=transformers.InternVLVisionConfig(
                **SIGLIP, image_size=[32, 32], patch_size=[4, 4], use_mean_pooling=True
            ),
            image_token_id=IMAGE, downsample_ratio=0.5, image_seq_length=16,
        )  # fmt: skip

    def image(self, size: int = 0) -> Media:
        tiles = [3, 1, 5][size]
        pixels = torch.randn(tiles, 3, 32, 32)
        return Media([START, *[IMAGE] * (16 * tiles), END], {"pixel_values": pixels})

    def video(self, frames: int = 4) -> Media:
        ids: list[int] = []
        for i in range(frames):
            ids += [130, 131 + i, START, *[IMAGE] * 16, END]
        return Media(ids, {"pixel_values": torch.randn(frames, 3, 32, 32)})


class SmolVLM(Family):
    """Each tile in a run of its own; images of a sample stand along the second axis.

    Before a tile is its place, or 140 before a whole picture.
    """

    name = "smolvlm"
    architecture = "SmolVLMForConditionalGeneration"

    def vision_config(self) -> dict[str, Any]:
        return dict(SIGLIP, image_size=32, patch_size=4)

    def config(self) -> Any:
        text = transformers.LlamaConfig(**LONG)
        return self.config_class()(
            text_config=text, vision_config=self.vision_config(), scale_factor=2,
            image_token_id=IMAGE, pad_token_id=PAD,
        )  # fmt: skip

    def decoder(self, model: nn.Module) -> nn.Module:
        return model.model.text_model

    def image(self, size: int = 0) -> Media:
        return self._tiles([3, 1, 5][size])

    def video(self, frames: int = 4) -> Media:
        return self._tiles(frames, whole=True)

    def _tiles(self, n: int, whole: bool = False) -> Media:
        ids: list[int] = []
        for i in range(n):
            ids += [130, 140 if whole or i == n - 1 else 131 + i, *[IMAGE] * 16]
        return Media([*ids, 130], {"pixel_values": torch.randn(n, 3, 32, 32)})

    def collect(self, rows: list[list[dict[str, Tensor]]]) -> dict[str, Tensor]:
        """Pad every sample to the same number of images, as the processor does."""
        samples = [[p["pixel_values"] for p in row] for row in rows]
        width = max((sum(len(p) for p in row) for row in samples), default=0)
        if width == 0:
            return {}
        pixels = torch.zeros(len(rows), width, 3, 32, 32)
        for sample, row in zip(pixels, samples, strict=True):
            if row:
                stacked = torch.cat(row)
                sample[: len(stacked)] = stacked
        return {"pixel_values": pixels}


class Idefics3(SmolVLM):
    name = "idefics3"
    architecture = "Idefics3ForConditionalGeneration"
