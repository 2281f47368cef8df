"""Tiny Qwen2-VL: the stock architecture with 14 px patches, 2×2 merger, M-RoPE, frame pairs."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from recipes.tiny.families.parts import Encode, Family, chatml, decoder, preprocessing

PATCH, MERGE, PAIR = 14, 2, 2
CELL = PATCH * MERGE
# Qwen2-VL's chat format: a default system turn, media between vision marks, ChatML turns.
CHAT_TEMPLATE = chatml(
    "<|vision_start|><|image_pad|><|vision_end|>", "<|vision_start|><|video_pad|><|vision_end|>"
)


class TinyQwen2VL(Family):
    """See :class:`~recipes.tiny.families.Family`."""

    chat_template = CHAT_TEMPLATE
    cell = CELL
    min_pixels, max_pixels = 56 * 56, 336 * 336

    def config(self, tokenizer) -> dict[str, Any]:
        """The flat config.json that every supported transformers version and vLLM read."""
        token = tokenizer.convert_tokens_to_ids
        rope = {"rope_scaling": {"type": "mrope", "mrope_section": [8, 12, 12]}}
        text = {**decoder(tokenizer), **rope}
        return {
            "architectures": ["Qwen2VLForConditionalGeneration"],
            "model_type": "qwen2_vl",
            "torch_dtype": "float16",
            **text,
            "image_token_id": token("<|image_pad|>"),
            "video_token_id": token("<|video_pad|>"),
            "vision_start_token_id": token("<|vision_start|>"),
            "vision_end_token_id": token("<|vision_end|>"),
            "vision_token_id": token("<|vision_pad|>"),
            "vision_config": {
                "model_type": "qwen2_vl",
                "depth": 3,
                "embed_dim": 128,
                "num_heads": 4,
                "mlp_ratio": 3,
                "hidden_size": text["hidden_size"],
                "in_channels": 3,
                "in_chans": 3,
                "patch_size": PATCH,
                "spatial_patch_size": PATCH,
                "spatial_merge_size": MERGE,
                "temporal_patch_size": PAIR,
                "hidden_act": "quick_gelu",
            },
        }

    def files(self, tokenizer) -> dict[str, dict[str, Any]]:
        """Configuration files of the HF folder, by file name."""
        size = {"shortest_edge": self.min_pixels, "longest_edge": self.max_pixels}
        pixels = {
            "processor_class": "Qwen2VLProcessor",
            "min_pixels": self.min_pixels,
            "max_pixels": self.max_pixels,
            "patch_size": PATCH,
            "merge_size": MERGE,
            "temporal_patch_size": PAIR,
            **preprocessing(size, *self.statistics()),
        }
        image = {"image_processor_type": "Qwen2VLImageProcessor", **pixels}
        video = {
            "video_processor_type": "Qwen2VLVideoProcessor",
            **pixels,
            "do_sample_frames": False,
            "cap_pixels_per_frame": False,
        }
        return {
            "config.json": self.config(tokenizer),
            "preprocessor_config.json": image,
            "video_preprocessor_config.json": video,
        }

    def weight_name(self, name: str) -> str:
        """Name of a parameter in published Qwen2-VL checkpoints."""
        return name.replace("model.visual.", "visual.").replace("model.language_model.", "model.")

    def grid(self, kind: str, shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """Merged token grid (t, rows, columns) of media of (frames, height, width) px."""
        frames, height, width = shape
        return max(1, frames // PAIR), height // CELL, width // CELL

    def tokens_per(self, kind: str, shape: tuple[int, int, int]) -> int:
        return int(np.prod(self.grid(kind, shape)))

    def expand(
        self, ids, kind: str, shape: tuple[int, int, int], encode: Encode, fps: float
    ) -> tuple[np.ndarray, np.ndarray]:
        t, rows, columns = self.grid(kind, shape)
        at = len(ids) - 2  # placeholder, then the end mark
        n = t * rows * columns
        full = np.concatenate([ids[:at], np.full(n, ids[at]), ids[at + 1 :]]).astype(np.int64)
        before = np.tile(np.arange(at), (3, 1))
        visual = np.indices((t, rows, columns)).reshape(3, n) + at
        after = np.full((3, 1), at + max(t, rows, columns))
        return full, np.concatenate([before, visual, after], axis=1)

    def statistics(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of pixels, in [0, 1]."""
        from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

        return list(OPENAI_CLIP_MEAN), list(OPENAI_CLIP_STD)

    def pixels(self, frames: torch.Tensor, kind: str) -> dict[str, torch.Tensor]:
        mean, std = (torch.tensor(value) * 255 for value in self.statistics())
        x = (frames.float() - mean) / std
        if kind == "image":
            x = x.expand(-1, PAIR, -1, -1, -1)
        b, count, height, width, _ = x.shape
        t, h, w = count // PAIR, height // CELL, width // CELL
        x = x.view(b, t, PAIR, h, MERGE, PATCH, w, MERGE, PATCH, 3)
        x = x.permute(0, 1, 3, 6, 4, 7, 9, 2, 5, 8)
        flat = x.reshape(b * t * h * w * MERGE**2, 3 * PAIR * PATCH**2)
        grid = torch.tensor([[t, h * MERGE, w * MERGE]]).expand(b, -1)
        if kind == "image":
            return {"pixel_values": flat, "image_grid_thw": grid}
        return {"pixel_values_videos": flat, "video_grid_thw": grid}

    def tokens(self, model, frames: torch.Tensor, kind: str) -> torch.Tensor:
        flat, grid = self.pixels(frames, kind).values()
        out = model.model.visual(flat, grid_thw=grid)
        merged = getattr(out, "pooler_output", out)
        count, height, width = frames.shape[1:4]
        t, rows, columns = self.grid(kind, (count, height, width))
        return merged.view(len(frames), t, rows, columns, -1)

    def vision_parameters(self, model) -> list[torch.nn.Parameter]:
        return list(model.model.visual.parameters())


FAMILY = TinyQwen2VL()
