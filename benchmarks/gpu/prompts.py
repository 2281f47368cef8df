"""Qwen2-VL decoders of three sizes with random weights, and prompts of images or a video."""

from __future__ import annotations

from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from benchmarks.models.prefill import still_video
from benchmarks.random_model import qwen2_vl

IMAGE, VIDEO = 151655, 151656
TEXT_BEFORE, TEXT_AFTER = 16, 48


@dataclass(frozen=True)
class Decoder:
    """Sizes of a decoder: width, MLP width, layers, query heads, key heads, vocabulary."""

    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int = 151936


DECODERS = {
    "0.5B": Decoder(896, 4864, 24, 14, 2),
    "2B": Decoder(1536, 8960, 28, 12, 2),
    "7B": Decoder(3584, 18944, 28, 28, 4),
}
TINY = {"tiny": Decoder(64, 96, 2, 4, 2)}


@dataclass(frozen=True)
class Prompt:
    """The visual part of a prompt.

    Attributes
    ----------
    media
        Number of images, or 1 for a video.
    grid
        Visual tokens of each of them: frames, rows, columns.
    """

    media: int
    grid: tuple[int, int, int]

    @property
    def tokens(self) -> int:
        """Visual tokens of one image or of the video."""
        frames, rows, columns = self.grid
        return frames * rows * columns

    @property
    def is_video(self) -> bool:
        return self.grid[0] > 1


PROMPTS = {
    "1 image": Prompt(1, (1, 24, 24)),
    "4 images": Prompt(4, (1, 24, 24)),
    "16 images": Prompt(16, (1, 24, 24)),
    "1 video": Prompt(1, (16, 16, 16)),
}
TINY_PROMPTS = {"2 images": Prompt(2, (1, 6, 6)), "1 video": Prompt(1, (3, 4, 4))}


def build(decoder: Decoder, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A random Qwen2-VL with this decoder and a one-layer vision tower, which never runs."""
    eighth = decoder.hidden // decoder.heads // 16
    ids = {"image_token_id": IMAGE, "video_token_id": VIDEO}
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            sections = (2 * eighth, 3 * eighth, 3 * eighth)
            return qwen2_vl(*astuple(decoder), sections=sections, ids=ids, tied=True)
    finally:
        torch.set_default_dtype(before)


def inputs_of(model: Any, prompt: Prompt) -> dict[str, Any]:
    """The arguments of one prefill, with features in the place of pixels."""
    torch.manual_seed(1)
    hidden, token = model.config.text_config.hidden_size, VIDEO if prompt.is_video else IMAGE
    frames, rows, columns = prompt.grid
    features = [still_video(frames, rows * columns, hidden) for _ in range(prompt.media)]
    pooled = tuple(f.to(model.device, model.dtype) for f in features)
    ids = [9] * TEXT_BEFORE + ([token] * prompt.tokens + [9]) * prompt.media + [11] * TEXT_AFTER
    input_ids = torch.tensor([ids], device=model.device)
    # transformers states grids in patches, two of which make up a token in either direction.
    grid = torch.tensor([[frames, 2 * rows, 2 * columns]] * prompt.media, device=model.device)
    kind, name = ("video", "video_grid_thw") if prompt.is_video else ("image", "image_grid_thw")
    return {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "mm_token_type_ids": (input_ids == token).int() * (2 if prompt.is_video else 1),
        "mm_encoder_outputs": {kind: BaseModelOutputWithPooling(pooler_output=pooled)},
        name: grid,
        "use_cache": True,
        "logits_to_keep": 1,
    }


def text_of(model: Any, columns: int) -> dict[str, Any]:
    """The arguments of one prefill of a text with that many tokens."""
    ids: Tensor = torch.full((1, columns), 9, device=model.device)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "use_cache": True,
        "logits_to_keep": 1,
    }
