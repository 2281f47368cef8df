"""Tiny Gemma 3: five local layers to one global, SigLIP tower, image tokens that see each other.

Local layers look back over fewer tokens than an image has, so most of what a question learns of
the image passes through the global layers. There is no video: Gemma 3's processor takes images.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch

from recipes.tiny.families.parts import (
    HALF,
    Encode,
    SiglipFamily,
    chatml,
    decoder,
    preprocessing,
    siglip,
)
from recipes.tiny.families.qwen3_vl import CORPUS
from recipes.tiny.tokenizer import SPECIAL_TOKENS

SIDE, PATCH, POOL = 224, 14, 2
CELL = PATCH * POOL
GRID = SIDE // CELL
WINDOW = 48  # tokens that a local layer sees; an image has 64
BEGIN, SOFT, END = "<start_of_image>", "<image_soft_token>", "<end_of_image>"
_RENAMED = {"<|vision_start|>": BEGIN, "<|image_pad|>": SOFT, "<|vision_end|>": END}


class TinyGemma3(SiglipFamily):
    """See :class:`~recipes.tiny.families.Family`."""

    kinds = ("image",)
    chat_template = chatml(BEGIN, "", system=False)
    special_tokens = tuple(_RENAMED.get(token, token) for token in SPECIAL_TOKENS)
    token_names: ClassVar[dict[str, str]] = {
        "boi_token": BEGIN,
        "image_token": SOFT,
        "eoi_token": END,
    }
    corpus = CORPUS
    cell = CELL
    card: ClassVar[dict[str, str]] = {
        "note": "Five of six layers see a window of tokens, and the tokens of an image see each "
        "other. It takes images, answers in one word, and has not been taught option letters. "
        "Words on pictures are not learned. The stages `balance`, `finish` and `tallies` were "
        "added after cards had shown that counts and small objects needed more; they started at "
        "the weights published before. The command repeats the recipe, not these exact weights."
    }

    def placeholder(self, kind: str) -> str:
        return SOFT

    def config(self, tokenizer) -> dict[str, Any]:
        """config.json as published Gemma 3 checkpoints have it."""
        token = tokenizer.convert_tokens_to_ids
        text = {
            **decoder(tokenizer),
            "model_type": "gemma3_text",
            "num_hidden_layers": 12,
            "num_key_value_heads": 1,
            "intermediate_size": 192,
            "head_dim": 64,
            "query_pre_attn_scalar": 64,
            "hidden_activation": "gelu_pytorch_tanh",
            "sliding_window": WINDOW,
            "sliding_window_pattern": 6,
            "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 2,
            "rope_theta": 1000000.0,
            "rope_local_base_freq": 10000.0,
            "tie_word_embeddings": True,
        }
        for name in ("hidden_act", "use_sliding_window"):
            del text[name]
        return {
            "architectures": ["Gemma3ForConditionalGeneration"],
            "model_type": "gemma3",
            "torch_dtype": "float16",
            "tie_word_embeddings": True,
            "text_config": text,
            "vision_config": siglip(SIDE, PATCH),
            "mm_tokens_per_image": GRID * GRID,
            "boi_token_index": token(BEGIN),
            "eoi_token_index": token(END),
            "image_token_index": token(SOFT),
            "eos_token_id": token("<|im_end|>"),
        }

    def build(self, tokenizer) -> torch.nn.Module:
        model: Any = super().build(tokenizer)
        # It starts at zero in transformers, which expects trained weights: nothing would reach
        # the tower.
        weight = model.model.multi_modal_projector.mm_input_projection_weight
        torch.nn.init.normal_(weight, std=weight.shape[0] ** -0.5)
        return model

    def files(self, tokenizer) -> dict[str, dict[str, Any]]:
        """Configuration files of the HF folder, by file name."""
        pixels = preprocessing({"height": SIDE, "width": SIDE}, HALF, HALF)
        return {
            "config.json": self.config(tokenizer),
            "preprocessor_config.json": {
                "image_processor_type": "Gemma3ImageProcessor",
                "processor_class": "Gemma3Processor",
                **pixels,
                "resample": 2,
                "image_seq_length": GRID * GRID,
            },
            "processor_config.json": {
                "processor_class": "Gemma3Processor",
                "image_seq_length": GRID * GRID,
            },
        }

    def tokens_per(self, kind: str, shape: tuple[int, int, int]) -> int:
        return GRID * GRID

    def expand(
        self, ids, kind: str, shape: tuple[int, int, int], encode: Encode, fps: float
    ) -> tuple[np.ndarray, np.ndarray]:
        """The processor sets empty lines around an image before it tokenises."""
        *before, begin = encode("<|im_start|>user\n" + BEGIN)
        assert [*ids] == [*before, begin]
        image = f"\n\n{BEGIN}{SOFT * self.tokens_per(kind, shape)}{END}\n\n"
        full = np.asarray(encode("<|im_start|>user\n" + image), np.int64)
        return full, np.arange(len(full))[None]

    @cached_property
    def _image_processor(self) -> Any:
        from transformers import Gemma3ImageProcessor

        pixels = preprocessing({"height": SIDE, "width": SIDE}, HALF, HALF)
        return Gemma3ImageProcessor(**{**pixels, "resample": 2})

    def pixels(self, frames: torch.Tensor, kind: str) -> dict[str, torch.Tensor]:
        planes = list(frames[:, 0].permute(0, 3, 1, 2))
        return {"pixel_values": self._image_processor(planes, return_tensors="pt")["pixel_values"]}

    def hidden(self, model, inputs: dict[str, Any]) -> torch.Tensor:
        """Image tokens see each other; local layers see the last `WINDOW` positions."""
        image = inputs["input_ids"] == model.config.image_token_id
        whole = inputs["attention_mask"] | (image[:, None, :, None] & image[:, None, None, :])
        positions = inputs["position_ids"]
        near = positions[:, None, None, :] > positions[:, None, :, None] - WINDOW
        masks = {"full_attention": whole, "sliding_attention": whole & near}
        return super().hidden(model, {**inputs, "attention_mask": masks})

    def tokens(self, model, frames: torch.Tensor, kind: str) -> torch.Tensor:
        """Tokens of the first frame: there is no other."""
        planes = self.pixels(frames, kind)["pixel_values"]
        features = model.model.get_image_features(planes, return_dict=True).pooler_output
        return features.view(len(frames), 1, GRID, GRID, -1)


FAMILY = TinyGemma3()
