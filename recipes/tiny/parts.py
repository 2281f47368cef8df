"""Put a trained part beside an embedded model, its weights as float16.

    tokencomp train selector --model tiny-qwen3-vl-hard --output FOLDER ...
    python -m recipes.tiny.parts FOLDER selector

The card says which model it belongs to. Loading makes the weights float32 again.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tokencomp.zoo import SAMPLES

MODELS = SAMPLES.parent / "models"


def ship(folder: Path, kind: str, models: Path = MODELS) -> Path:
    """Copy the part of a kind ("selector" or "ccam") from a folder; returns the written file."""
    card, source = folder / f"{kind}.json", folder / f"{kind}.safetensors"
    target = models / json.loads(card.read_text(encoding="utf-8"))["model_id"] / "tokencomp"
    target.mkdir(exist_ok=True)
    tensors = load_file(source)
    half = {k: t.to(torch.float16) if t.is_floating_point() else t for k, t in tensors.items()}
    save_file(half, target / source.name)
    shutil.copy(card, target)
    return target / source.name


if __name__ == "__main__":
    print(ship(Path(sys.argv[1]), sys.argv[2]))
