"""A tiny untrained model with a real processor, and small training data on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from tokencomp.zoo.export import export
from tokencomp.zoo.families import family
from tokencomp.zoo.tokenizer import load_tokenizer, write_tokenizer


def tiny(folder: Path, seed: int = 0) -> tuple[Any, Any]:
    """Model and processor of the smallest zoo architecture with random weights."""
    from tokencomp.evaluation.loading import load_model

    made = family("tiny-qwen2-vl")
    write_tokenizer(folder, made.chat_template)
    torch.manual_seed(seed)
    export(made.build(load_tokenizer(folder)), made, folder)
    return load_model(str(folder), device="cpu")


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
