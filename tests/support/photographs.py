"""Drawings instead of photographs, and a FastVLM small enough to train in a test."""

from __future__ import annotations

import torch
from PIL import Image
from transformers import PreTrainedTokenizerFast

from recipes.photographs.model import IMAGE, fast_vlm
from recipes.photographs.questions import COUNTS
from recipes.tiny.tokenizer import train_tokenizer

COLORS = {
    "ant": (255, 0, 0), "bee": (0, 255, 0), "cat": (0, 0, 255), "dog": (255, 255, 0),
    "eel": (255, 0, 255), "fox": (0, 255, 255), "gnu": (255, 128, 0), "hen": (128, 0, 255),
}  # fmt: skip


class Drawings:
    """Things are rectangles of one colour each, backgrounds are grey."""

    names = tuple(COLORS)

    def numbers(self, name: str, split: str) -> tuple[int, ...]:
        return (0,)

    def picture(self, name: str, number: int) -> Image.Image:
        return Image.new("RGBA", (60, 40), (*COLORS[name], 255))

    def backgrounds(self, split: str) -> int:
        return 1

    def background(self, split: str, number: int) -> Image.Image:
        return Image.new("RGB", (600, 600), (60, 60, 60))


def toy() -> tuple[torch.nn.Module, PreTrainedTokenizerFast]:
    """A FastVLM of a few thousand weights whose tower has the stride of the real one."""
    from transformers import ResNetConfig

    texts = tuple(f" {w}" for w in (*COLORS, *COUNTS, "background", "center", "middle"))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=train_tokenizer(texts=texts),
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
    )
    text = dict(
        model_type="llama", vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48,
        num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
        tie_word_embeddings=True, pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    tower = ResNetConfig(
        hidden_size=16,
        embedding_size=8,
        hidden_sizes=[8, 8, 8, 16],
        depths=[1, 1, 1, 1],
        layer_type="basic",
    )
    torch.manual_seed(0)
    return fast_vlm(text, tower.to_dict(), tokenizer.convert_tokens_to_ids(IMAGE)), tokenizer
