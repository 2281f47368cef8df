"""Pages of the trained methods: paired tests and columns counted again from the stored bits."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import pytest

from benchmarks.accuracy.packed import PackedAnswers, Questions
from benchmarks.accuracy.studies import trained_page

FOLDER = Path(__file__).parents[2] / "benchmarks" / "accuracy"


def test_won_and_lost_questions_are_those_of_the_published_bits() -> None:
    """Of CCAM's mask against none; p is the share of outcomes that are no likelier."""
    tables = json.loads((FOLDER / "ccam.json").read_text())["tables"]
    data = csv.DictReader((FOLDER / "ccam.csv").read_text().splitlines())
    published = {row["set"]: row for row in data if row["method"] == "ccam"}
    assert list(tables) == ["image", "video, 8 frames", "video, 16 frames", "video, 48 frames"]
    for title, table in tables.items():
        correct = PackedAnswers.from_json(table["answers"]).correct
        key = next(k for k in correct if k.startswith("ccam@"))
        other = correct[key.replace("ccam@", "ccam without mask@")]
        pairs = [*zip(correct[key], other, strict=True)]
        won, lost = pairs.count((1, 0)), pairs.count((0, 1))
        n = won + lost
        outcomes = [math.comb(n, k) for k in range(n + 1)]
        p = sum(one for one in outcomes if one <= outcomes[won]) / 2**n
        (row,) = (r for r in table["rows"] if r["name"] == "ccam")
        found = row["against"]["ccam without mask"]
        assert (found["wins"], found["losses"]) == (won, lost)
        assert found["p"] == pytest.approx(p)
        cells = [published[title][f"{part}_ccam without mask"] for part in ("wins", "losses")]
        assert cells == [str(won), str(lost)]


def test_where_downscale_fails_by_plain_counting() -> None:
    """Of ten questions downscaling gets four wrong, and the method answers three of those."""
    correct = {"ours@0.5": [1] * 9 + [0], "downscale@0.5": [1] * 6 + [0] * 4}
    agrees = {"ours@0.5": [1] * 8 + [0] * 2, "downscale@0.5": [1] * 6 + [0] * 4}
    answers = PackedAnswers(Questions((), (), (), ""), correct, agrees)
    rows = [
        {"name": name, "ratio": 0.5, "accuracy": 0.9, "achieved_ratio": 0.5}
        for name in ("ours", "downscale")
    ]
    stored = {"count": {"rows": trained_page.compared(rows, answers, {})}}
    ours, small = trained_page.records(stored)
    assert ours["vs_downscale"] == pytest.approx(0.3) and ours["where_downscale_fails"] == 0.75
    assert ours["same_answer"] == 0.8 and small["vs_downscale"] is None
    rows[1]["achieved_ratio"] = 0.2  # no baseline at this ratio
    stored["count"]["rows"] = trained_page.compared(rows, answers, {})
    ours, small = trained_page.records(stored)
    assert ours["vs_downscale"] is None and "accuracy" not in small
