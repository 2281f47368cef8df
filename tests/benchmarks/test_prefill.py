"""The prefill benchmark writes what it has measured after every repeat."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.models import prefill, shapes
from benchmarks.models.architectures import Shape

NAME = "llava-tiny"


def run(monkeypatch: pytest.MonkeyPatch, out: Path) -> None:
    options = ["--quick", "--out", str(out), "--allow-dirty", "--dtype", "float32"]
    monkeypatch.setattr("sys.argv", ["prefill.py", *options])
    prefill.main()


def test_a_run_that_ends_early_leaves_its_repeats(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The page is that of the file; another run replaces the records of its models alone."""
    out = tmp_path / "quick.jsonl"
    methods = (("aim", False), ("bipartite", False))
    shape = Shape("llava_onevision", 32, 32, 8, 2, 1)
    monkeypatch.setitem(shapes.SHAPES, NAME, shape)
    monkeypatch.setattr(prefill, "KINDS", {NAME: ("video",)})
    monkeypatch.setattr(
        prefill, "QUICK", (prefill.Piece(NAME, "video", 392, methods, (0.5,), 3, False),)
    )
    seconds, runs = prefill.prefill, []

    def interrupted(model: Any, inputs: Any) -> float:
        runs.append(seconds(model, inputs))
        if len(runs) == 5:  # a repeat has three: the full model, two cases
            raise KeyboardInterrupt
        return runs[-1]

    monkeypatch.setattr(prefill, "prefill", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(monkeypatch, out)
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(r["reducer"], r["merge"]) for r in records] == list(methods)
    assert all(len(r["seconds_compressed"]) == 1 for r in records)
    assert [r["seconds_compressed"][0] for r in records] == runs[1:3]
    assert records[0]["speedup"] == round(runs[0] / runs[1], 3)
    monkeypatch.setattr(prefill, "prefill", seconds)
    run(monkeypatch, out)
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [len(r["seconds_compressed"]) for r in records] == [3, 3]
    assert out.with_suffix(".md").read_text() == prefill.page(records)


def test_an_image_is_merged_by_default_and_dropped_on_request() -> None:
    """The cache of merged tokens keeps its size."""
    shape = Shape("qwen2_vl", 256, 64, 2, 2, 1)  # heads as wide as the real ones
    methods = (*prefill.DEFAULT["image"], ("uniform", False))
    piece = prefill.Piece("qwen-tiny", "image", 256, methods, (0.5, 0.75), 1, False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(shapes.SHAPES, "qwen-tiny", shape)
        (records,) = prefill.measure(piece, torch.float32)
    assert [prefill.method_of(r) for r in records[::2]] == ["auto", "auto merge=False", "uniform"]
    assert {r["kind"] for r in records} == {"image"}
    kept = [r["kv_bytes_compressed"] / r["kv_bytes_full"] for r in records]
    prompt = 256 + prefill.TEXT_BEFORE + prefill.TEXT_AFTER
    assert kept == pytest.approx([1, 1, *[(prompt - 128) / prompt, (prompt - 192) / prompt] * 2])
