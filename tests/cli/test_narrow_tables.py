"""Tables in 80 columns, as in every pipe and log: no number is cut, and nothing is left out."""

from __future__ import annotations

import csv
import json
import re

import pytest
from evaluation.test_report import write_run
from support.console import run

PLAN = [{"layer": 0, "fraction": 0.5, "reducer": "kcenter"}, {"layer": 4, "fraction": 0.25}]
SCORES = {f"a{k}": int(k % 3 > 0) for k in range(9)}
METHODS = [
    ("condiv", 0.75, {"power": 0.3, "merge": True}),
    ("kcenter", 0.75, {"tower_ratio": 0.5, "tower_reducer": "uniform"}),
    ("auto", {"image": 0.5, "video": 0.9}, {}),
    ("auto", "budget=prompt=40", {}),
    ("plan", 0.65625, {"plan": PLAN}),
]


@pytest.fixture
def runs(tmp_path):
    root = tmp_path / "runs"
    for name in ("full", "random", "downscale"):
        ratio = 0.75 if name != "full" else 0.0
        write_run(root, name, ratio, {**SCORES, "a1": int(name == "full"), "a2": 1})
    for k, (name, ratio, options) in enumerate(METHODS):
        scores = {**SCORES, "a1": k % 2, "a4": int(k == 1)}  # the second is like the full model
        folder = write_run(root / f"{k}", name, 0.5, scores, options=options)
        file = folder / "manifest.json"
        content = json.loads(file.read_text())
        content["identity"]["ratio"] = ratio
        file.write_text(json.dumps(content))
        folder.rename(root / f"m{k}")
    return root


def test_no_number_of_a_report_is_cut(runs, tmp_path, capsys):
    files = (tmp_path / "t.csv", tmp_path / "t.tex")
    page = tmp_path / "page.html"
    assert run("report", runs, "-o", page, "--table", files[0], "--table", files[1]) == 0
    out = capsys.readouterr().out
    assert "…" not in out
    with files[0].open() as file:
        rows = list(csv.DictReader(file))
    first = out.partition("Differences")[0]
    for row in rows:
        assert f"{float(row['accuracy']):.1%}" in first
        if row["retention"]:
            low, high = float(row["retention_low"]), float(row["retention_high"])
            assert f"{float(row['retention']):.1%} [{low:.0%}, {high:.0%}]" in first
            points = (100 * float(row[f"against_full{end}"]) for end in ("_low", "_high"))
            assert "[{:+.0f}, {:+.0f}]".format(*points) in out
    assert [row["retention_low"] for row in rows].count("") == 1  # of the full model
    assert {"plan", "condiv merge=True power=0.3"} <= {row["method"] for row in rows}
    for text in (out, files[1].read_text(), re.sub("<[^>]*>", "", page.read_text())):
        assert "fraction" not in text and "kcenter" in text
