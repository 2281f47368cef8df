"""Trained parts that are put beside an embedded model."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from recipes.tiny.parts import ship


def test_weights_become_half_and_counts_stay(tmp_path: Path) -> None:
    folder, models = tmp_path / "trained", tmp_path / "models"
    folder.mkdir()
    (models / "tiny-x").mkdir(parents=True)
    weights, steps = torch.randn(4, 5), torch.tensor(70_001)
    save_file({"weights": weights, "steps": steps}, folder / "selector.safetensors")
    card = {"model_id": "tiny-x", "kind": "selector"}
    (folder / "selector.json").write_text(json.dumps(card))
    path = ship(folder, "selector", models)
    assert path == models / "tiny-x" / "tokencomp" / "selector.safetensors"
    assert json.loads(path.with_suffix(".json").read_text()) == card
    found = load_file(path)
    assert found["weights"].dtype == torch.float16 and torch.equal(found["steps"], steps)
    assert (found["weights"].float() - weights).abs().max() < 1e-2
