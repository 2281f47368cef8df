"""The prefill benchmark writes what it has measured after every repeat."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

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
    out, cases = tmp_path / "quick.jsonl", (("aim", 0.5), ("merge", 0.75))
    shape = Shape("llava_onevision", 32, 32, 8, 2, 1)
    monkeypatch.setitem(shapes.SHAPES, NAME, shape)
    monkeypatch.setattr(prefill, "MODELS", (NAME,))
    monkeypatch.setattr(prefill, "QUICK", (prefill.Piece(NAME, 392, cases, 3, False),))
    seconds, runs = prefill.prefill, []

    def interrupted(model: Any, inputs: Any) -> float:
        runs.append(seconds(model, inputs))
        if len(runs) == 8:  # a repeat has five: the full model, two texts, two cases
            raise KeyboardInterrupt
        return runs[-1]

    monkeypatch.setattr(prefill, "prefill", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(monkeypatch, out)
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(r["reducer"], r["ratio"]) for r in records] == list(cases)
    assert all(len(r["seconds_compressed"]) == 1 for r in records)
    assert [r["seconds_compressed"][0] for r in records] == runs[3:5]
    assert records[0]["speedup"] == round(runs[0] / runs[3], 3)
    monkeypatch.setattr(prefill, "prefill", seconds)
    run(monkeypatch, out)
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [len(r["seconds_compressed"]) for r in records] == [3, 3]
    assert out.with_suffix(".md").read_text() == prefill.page(records)
