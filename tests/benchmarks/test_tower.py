"""The pages of the tower stage say what their records say."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from support.families import FAMILIES

from benchmarks.accuracy.studies import tower as study
from benchmarks.accuracy.studies import tower_book, tower_sizes
from benchmarks.models import tower, tower_alone
from tokencomp.inputs.loading import load_model
from tokencomp.inputs.prompts import build_inputs, prompt_lengths


def test_a_set_is_answered_row_by_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that exist stay unless they are named; rows of other weights are answered again."""
    one = study.QuestionSet(study.QWEN, ("attribute",), 1, ("uniform",), ())
    monkeypatch.setattr(study, "SETS", {"qwen-images": one})
    monkeypatch.setattr(study, "ACCURACY", tmp_path / "folder")
    monkeypatch.setattr(study, "write_page", lambda sets, folder: None)
    monkeypatch.setattr(sys, "argv", ["tower", "--output", str(tmp_path)])
    settings_run: list[list[str]] = []
    sweep = study.sweep

    def noted(model: Any, processor: Any, items: Any, settings: Any, *a: Any, **kw: Any) -> Any:
        settings_run.append([s.name for s in settings])
        return sweep(model, processor, items, settings, *a, **kw)

    monkeypatch.setattr(study, "sweep", noted)
    study.main()
    path = tmp_path / "tower.json"
    first = path.read_text()
    book = tower_book.read(path)
    correct = book["qwen-images"]["answers"].correct
    assert len(correct) == 6 and len(settings_run.pop()) == 6
    study.main()
    assert not settings_run and path.read_text() == first
    assert correct.pop("uniform@0.6")
    tower_book.write(path, book)
    study.main()
    assert settings_run.pop() == ["uniform 0.6"]
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--rows", "uniform", "--again"])
    study.main()
    assert settings_run.pop() == ["uniform 0.5", "uniform 0.6", "uniform 0.75"]
    monkeypatch.setattr(sys, "argv", sys.argv[:3])
    stale = tower_book.read(path)
    assert stale["qwen-images"]["answers"] == tower_book.read(path)["qwen-images"]["answers"]
    stale["qwen-images"]["weights"] = "other"
    tower_book.write(path, stale)
    study.main()
    assert len(settings_run.pop()) == 6


@pytest.mark.parametrize("name", [study.ONEVISION, study.VILA])
def test_smaller_towers(name: str) -> None:
    """At its own size a model answers as ever; at a smaller one it gets fewer tokens."""
    picture, tokens = Image.new("RGB", (224, 224), "red"), {}
    plain, processor = load_model(name, device="cpu")
    side = plain.config.vision_config.image_size
    inputs = build_inputs(processor, [[picture]], ["What is it?"])
    with torch.no_grad():
        expected = plain(**inputs).logits
    for size in (side, study.SIDES[name][-1]):
        model, processor = tower_sizes.at_side(name, size)
        inputs = build_inputs(processor, [[picture]], ["What is it?"])
        with torch.no_grad():
            logits = model(**inputs).logits
        tokens[size] = prompt_lengths(model, inputs)[0][1]
        if size == side:
            assert torch.allclose(logits, expected, atol=1e-5)
    assert tokens[size] < 0.35 * tokens[side]


def test_towers_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One block of width 32 on n patches and the merger, which reads four patches at a time."""
    monkeypatch.setattr(tower_alone, "build", lambda *_, **__: FAMILIES["qwen2_vl"].build())
    monkeypatch.setattr(tower_alone, "qwen_inputs", lambda *_: {"inputs": _square()})
    command = ["tower", "--towers", "--cases", "qwen-tower", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", command)
    tower.main()
    rows = [json.loads(line) for line in (tmp_path / "tower.jsonl").read_text().splitlines()]
    assert [r["tower_ratio"] for r in rows] == list(tower_alone.TOWER_RATIOS)
    linear = 2 * (32 * 96 + 32 * 32 + 2 * 32 * 64)
    flops = [n * linear + 4 * 32 * n * n + n // 4 * 2 * (128 * 128 + 128 * 64) for n in (256, 128)]
    assert rows[2]["flop_limit"] == pytest.approx(flops[0] / flops[1])
    assert (tmp_path / "tower.csv").read_text().count("tower of Qwen2-VL-2B and 7B") == 4


def _square() -> dict[str, torch.Tensor]:
    """A picture of 16 x 16 patches for the tiny Qwen2-VL."""
    return {"pixel_values": torch.randn(256, 96), "image_grid_thw": torch.tensor([[1, 16, 16]])}
