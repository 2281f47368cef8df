"""Tiny LLaVA-OneVision: SigLIP tower, MLP projector, Qwen2 decoder, anyres images, pooled video."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import torch

from recipes.tiny.families.parts import (
    HALF,
    Encode,
    SiglipFamily,
    decoder,
    preprocessing,
    siglip,
)

SIDE, PATCH = 192, 16
GRID = SIDE // PATCH
PINPOINTS = [[SIDE, SIDE], [SIDE, 2 * SIDE], [2 * SIDE, SIDE]]
# LLaVA-OneVision's chat format: media first, then the text on a new line, ChatML marks.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] -}}"
    "{%- if message['role'] != 'assistant' -%}{{- ' ' -}}{%- endif -%}"
    "{%- if message['content'] is string -%}{{- '\\n' + message['content'] -}}"
    "{%- else -%}"
    "{%- for part in message['content'] -%}"
    "{%- if part['type'] in ('image', 'image_url') -%}{{- '<image>' -}}"
    "{%- elif part['type'] == 'video' -%}{{- '<video>' -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'text' -%}{{- '\\n' + part['text'] -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- endif -%}"
    "{{- '<|im_end|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)


class TinyLlavaOnevision(SiglipFamily):
    """See :class:`~recipes.tiny.families.Family`."""

    chat_template = CHAT_TEMPLATE
    cell = PATCH

    def config(self, tokenizer) -> dict[str, Any]:
        """config.json as published LLaVA-OneVision checkpoints have it."""
        token = tokenizer.convert_tokens_to_ids
        return {
            "architectures": ["LlavaOnevisionForConditionalGeneration"],
            "model_type": "llava_onevision",
            "torch_dtype": "float16",
            "text_config": {"model_type": "qwen2", **decoder(tokenizer)},
            "image_token_index": token("<image>"),
            "video_token_index": token("<video>"),
            "image_grid_pinpoints": PINPOINTS,
            "projector_hidden_act": "gelu",
            "multimodal_projector_bias": True,
            "vision_aspect_ratio": "anyres_max_9",
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "full",
            "use_image_newline_parameter": True,
            "tie_word_embeddings": False,
            "vision_config": siglip(SIDE, PATCH),
        }

    def files(self, tokenizer) -> dict[str, dict[str, Any]]:
        """Configuration files of the HF folder, by file name."""
        pixels = {
            "processor_class": "LlavaOnevisionProcessor",
            **preprocessing({"height": SIDE, "width": SIDE}, HALF, HALF),
        }
        image = {
            "image_processor_type": "LlavaOnevisionImageProcessor",
            "image_grid_pinpoints": PINPOINTS,
            "do_pad": True,
            **pixels,
        }
        video = {"video_processor_type": "LlavaOnevisionVideoProcessor", **pixels}
        processor = {
            "processor_class": "LlavaOnevisionProcessor",
            "num_image_tokens": GRID * GRID,
            "vision_feature_select_strategy": "full",
            "vision_aspect_ratio": "anyres_max_9",
            "image_token": "<image>",
            "video_token": "<video>",
        }
        return {
            "config.json": self.config(tokenizer),
            "preprocessor_config.json": image,
            "video_preprocessor_config.json": video,
            "processor_config.json": processor,
        }

    @cached_property
    def _image_processor(self) -> Any:
        from transformers import LlavaOnevisionImageProcessor

        keep = self.files(_AnyTokens())["preprocessor_config.json"]
        return LlavaOnevisionImageProcessor(**_without_names(keep))

    @cached_property
    def _video_processor(self) -> Any:
        from transformers import LlavaOnevisionVideoProcessor

        keep = self.files(_AnyTokens())["video_preprocessor_config.json"]
        return LlavaOnevisionVideoProcessor(**_without_names(keep))

    def tokens_per(self, kind: str, shape: tuple[int, int, int]) -> int:
        """Base tile, tiles without padding, and one newline per row; pooled frames for video."""
        from transformers import LlavaOnevisionProcessor

        frames, height, width = shape
        if kind == "video":
            return frames * (GRID // 2) ** 2 + 1
        counter = LlavaOnevisionProcessor.__new__(LlavaOnevisionProcessor)
        counter.num_image_tokens, counter.vision_aspect_ratio = GRID * GRID, "anyres_max_9"
        counter.image_processor = self._image_processor
        return int(counter._get_number_of_features(height, width, SIDE, SIDE))

    def expand(
        self, ids, kind: str, shape: tuple[int, int, int], encode: Encode, fps: float
    ) -> tuple[np.ndarray, np.ndarray]:
        at, n = len(ids) - 2, self.tokens_per(kind, shape)  # placeholder, then the line end
        full = np.concatenate([ids[:at], np.full(n, ids[at]), ids[at + 1 :]]).astype(np.int64)
        return full, np.arange(len(full))[None]

    def pixels(self, frames: torch.Tensor, kind: str) -> dict[str, torch.Tensor]:
        planes = frames.permute(0, 1, 4, 2, 3)
        if kind == "image":
            out = self._image_processor(list(planes[:, 0]), return_tensors="pt")
            return {key: out[key] for key in ("pixel_values", "image_sizes")}
        out = self._video_processor(list(planes), return_tensors="pt")
        return {"pixel_values_videos": out["pixel_values_videos"]}

    def tokens(self, model, frames: torch.Tensor, kind: str) -> torch.Tensor:
        """Tokens of the base tile, before any pooling, for every frame."""
        batch, count = frames.shape[:2]
        flat = frames.flatten(0, 1).permute(0, 3, 1, 2)[:, None]
        planes = self._video_processor(list(flat), return_tensors="pt")["pixel_values_videos"]
        hidden = model.model.vision_tower(planes[:, 0], output_hidden_states=True).hidden_states[-1]
        return model.model.multi_modal_projector(hidden).view(batch, count, GRID, GRID, -1)

    def parts(self, model) -> dict[str, torch.nn.Module]:
        return {**super().parts(model), "siglip": model.model.vision_tower}


class _AnyTokens:
    """Stands in for a tokenizer where ids do not matter."""

    def __len__(self) -> int:
        return 1

    def convert_tokens_to_ids(self, token: str) -> int:
        return 0


def _without_names(config: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in config.items() if not k.endswith(("_class", "_type"))}


FAMILY = TinyLlavaOnevision()
