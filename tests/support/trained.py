"""A tiny untrained model with a real processor, and small training data on disk."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from recipes.tiny.export import export
from recipes.tiny.families import family
from recipes.tiny.tokenizer import load_tokenizer
from tokencomp.adapters.registry import adapter_for
from tokencomp.training.selector.train import SelectorConfig

SELECTOR = SelectorConfig(
    samples=6, kind="image", batch=3, epochs=1, held_out=3, evaluate=2, max_new_tokens=2
)


def tiny(folder: Path, seed: int = 0, name: str = "tiny-qwen2-vl") -> tuple[Any, Any]:
    """Model and processor of an embedded architecture, the smallest one, with random weights."""
    from tokencomp.inputs.loading import load_model

    made = family(name)
    made.write_tokenizer(folder / "tokenizer")
    torch.manual_seed(seed)
    export(made.build(load_tokenizer(folder / "tokenizer")), made, folder)
    return load_model(str(folder), device="cpu")


def broken(model: Any) -> Any:
    """A copy of `model` whose first attention layer computes NaN."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        adapter_for(model).layers[0].self_attn.k_proj.weight.fill_(torch.nan)
    return model


def write_data(folder: Path, count: int = 8) -> Path:
    """Plain pictures of 84 px (nine tokens) with one-word questions, two per line kind."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(count):
        name = f"{i}.png"
        Image.new("RGB", (84, 84), (30 * i % 255, 90, 200)).save(folder / name)
        rows.append({"question": "What color is the circle?", "answer": "red", "media": name})
    (folder / "questions.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder
