"""What the tiny models share: sizes, sharpened weights, tokenizers with more tokens, and files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from recipes.tiny.tokenizer import load_tokenizer, write_tokenizer

SHARPER = 2.5
DECODER: dict[str, Any] = dict(
    hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=2,
    num_key_value_heads=2, max_position_embeddings=8192,
)  # fmt: skip
TOWER: dict[str, Any] = dict(  # of models with M-RoPE
    depth=2, hidden_size=64, intermediate_size=128, num_heads=2, out_hidden_size=128,
    patch_size=14, spatial_merge_size=2, temporal_patch_size=2, in_channels=3,
)  # fmt: skip
TILE_TOWER: dict[str, Any] = dict(  # of models that cut images into tiles
    hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2
)
PIXELS = {"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 4096}


def sharpen(model: torch.nn.Module) -> torch.nn.Module:
    """Scale the random weights, whose attention is otherwise too flat to reveal mistakes."""
    with torch.no_grad():
        for parameter in model.model.language_model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(SHARPER)
    return model


def tokenizer_with(folder: Path, tokens: list[str]) -> Any:
    """Write the embedded models' tokenizer with further special tokens, and return it."""
    write_tokenizer(folder, "")
    tokenizer = load_tokenizer(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": tokens})
    tokenizer.save_pretrained(folder)
    return tokenizer


def vocabulary(tokenizer: Any) -> int:
    """Return the number of rows of an embedding for this tokenizer, a multiple of 64."""
    return (len(tokenizer) + 63) // 64 * 64


def write(model: Any, weights: dict[str, torch.Tensor], folder: Path) -> None:
    """Write the config of a model, and weights under the names that a checkpoint has."""
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    write_weights(weights, folder)


def write_weights(weights: dict[str, torch.Tensor], folder: Path) -> None:
    """Write weights as a checkpoint of one file."""
    weights = {name: tensor.contiguous() for name, tensor in weights.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
