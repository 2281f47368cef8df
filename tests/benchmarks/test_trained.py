"""Pages of the trained methods: paired tests by hand, and what a table says of its own run."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import pytest
from support.accuracy import answer_record

from benchmarks.accuracy.packed import PackedAnswers, Questions
from benchmarks.accuracy.studies import (
    trained,
    trained_page,
)
from benchmarks.accuracy.studies.trained import named
from tokencomp.evaluation.runs import EvalRun
from tokencomp.training.measure import Measurement

FOLDER = Path(__file__).parents[2] / "benchmarks" / "accuracy"
RIVALS = {"trained": ("training-free",)}
CARD = {
    "kind": "adsc",
    "model_id": "m",
    "data": "shapesqa:count",
    "seconds": 60.0,
    "config": {"steps": 7, "schedule": ["0.8", "0|0.5"], "options": {}, "seed": 3},
}


def arguments(folder: Path, sets: list[str], **more: Any) -> argparse.Namespace:
    defaults = {"model": "m", "split": "test", "report": False, "every": ["count", "video"]}
    return argparse.Namespace(output=folder, sets=sets, allow_dirty=True, **{**defaults, **more})


def filled(folder: Path, sets: list[str], right: dict[str, list[int]]) -> trained.StudyTables:
    """A study with one table per set."""
    card = folder / "card.json"
    card.write_text(json.dumps(CARD))
    study = trained.StudyTables("adsc", arguments(folder, sets), RIVALS)
    rows = [k.partition("@") for k in right if k != "full@0"]
    ways = [named(name, float(ratio), "uniform") for name, _, ratio in rows]
    for title in sets:
        measured = Measurement({}, None)
        for key, bits in right.items():
            records = [answer_record(str(i), "count", bool(bit)) for i, bit in enumerate(bits)]
            measured.runs[key] = EvalRun(None, records)
        study.add(title, measured.table(ways), measured.runs, {"trained": card})
    study.write()
    return study


RIGHT = {
    "full@0": [1] * 20,
    "trained@0.5": [1] * 18 + [0, 1],
    "training-free@0.5": [1] * 8 + [0] * 10 + [1, 1],
    "random@0.5": [0] * 20,
}


def test_paired_test_is_reported(tmp_path: Path, capsys) -> None:
    study = filled(tmp_path, ["count"], RIGHT)
    row = next(r for r in study.tables["count"]["rows"] if r["name"] == "trained")
    exact = 2 * sum(math.comb(11, k) for k in range(2)) / 2**11  # ten won, one lost
    assert row["against"] == {"training-free": {"wins": 10, "losses": 1, "p": pytest.approx(exact)}}
    page = (tmp_path / "adsc.md").read_text()
    assert "| count | trained | 0.5 | training-free | 10 | 1 | 0.012 | better |" in page
    assert "- trained against training-free: better: count at 0.5 (p = 0.012)." in page
    assert "tokencomp train adsc --model m --data shapesqa:count --seed 3 " in page
    assert "--schedule '0.8,0|0.5' --steps 7 --output FOLDER` (60 s)" in page
    assert page in capsys.readouterr().out


def test_where_downscale_fails_by_plain_counting() -> None:
    """Of ten questions downscaling gets four wrong, and the method answers three of those."""
    correct = {"ours@0.5": [1] * 9 + [0], "downscale@0.5": [1] * 6 + [0] * 4}
    agrees = {"ours@0.5": [1] * 8 + [0] * 2, "downscale@0.5": [1] * 6 + [0] * 4}
    answers = PackedAnswers(Questions((), (), (), ""), correct, agrees)
    rows = [
        {"name": name, "ratio": 0.5, "accuracy": 0.9, "achieved_ratio": 0.5}
        for name in ("ours", "downscale")
    ]
    ours, small = (trained_page.cells(r) for r in trained_page.compared(rows, answers, {}))
    assert ours[5].startswith("+30.0 [") and ours[6:] == ["75% of 4", "80%"]
    assert small[5:] == ["", "", "60%"]
    rows[1]["achieved_ratio"] = 0.2  # no baseline at this ratio
    ours, small = (trained_page.cells(r) for r in trained_page.compared(rows, answers, {}))
    assert ours[5:] == ["", "", "80%"] and set(small[2:]) == {"–"}
