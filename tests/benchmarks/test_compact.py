"""The stored form of sweeps gives back what was written, and says equal things once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks import publishing
from benchmarks.accuracy.compact import read_sweep, write_sweep

QUESTIONS = {"ids": ["a", "b", "c"], "families": ["count"] * 3, "answers": "1 2 3", "digest": "d"}
WORK = {"images": {"tower": 12, "prefill": 34}}


def setting(run: int = 0, **more: Any) -> dict[str, Any]:
    cost = {"achieved_ratio": 0.25, "flops": 7.5, "kv_bytes": 3.0, "achieved": {"images": 0.25}}
    return {"reducer": "uniform", "ratio": 0.25, "run": run, **cost, "work": WORK, **more}


def test_a_sweep_comes_back(tmp_path: Path) -> None:
    """1 0 1 and 1 1 0 are the bits 101 and 110 of one byte, in base64."""
    manifest = {
        "model": "made-up",
        "items": 3,
        "runs": [{"commit": None}, {"commit": "c"}],
        "settings": {"one": setting(), "two": setting(1, options={"seed": 2}, method="older")},
    }
    answers = {
        "questions": QUESTIONS,
        "correct": {"one": "oA==", "two": "wA=="},
        "agrees": {"one": "4A==", "two": "AA=="},
    }
    path = tmp_path / "test.json"
    write_sweep(path, manifest, answers)
    stored = json.loads(path.read_text())
    assert len(stored["shared"]) == 2  # one cost, one work
    assert "accuracy" not in path.read_text() and "options" not in stored["settings"]["one"]
    counted = {"items": 3, "failed": 0, "accuracy": 2 / 3}
    settings = {
        "one": {**setting(), "options": {}, **counted},
        "two": {**setting(1, options={"seed": 2}, method="older"), **counted},
    }
    assert read_sweep(path) == {**manifest, "settings": settings, "answers": answers}


def test_lines_of_stored_json_hold_what_fits(tmp_path: Path) -> None:
    row = {"case": "x" * 150, "values": [0.5, None]}
    value = {"rows": [row] * 5, "none": [], "text": "y" * 500}
    publishing.write(tmp_path / "a.json", value)
    lines = (tmp_path / "a.json").read_text().splitlines()
    assert json.loads("\n".join(lines)) == value
    assert len([line for line in lines if '"case"' in line]) == 5
    assert [len(line) > publishing.WIDTH + 9 for line in lines].count(True) == 1  # the text alone
