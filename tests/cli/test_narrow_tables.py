"""Tables in 80 columns, as in every pipe and log: no number is cut, no name is broken."""

from __future__ import annotations

import csv
import io
import json
import re

import pytest
from evaluation.test_report import write_run
from rich.console import Console
from rich.text import Text
from support.console import run

from tokencomp.cli._fitted import print_beside, print_fitted
from tokencomp.cli.profile import LINES, show

PLAN = [{"layer": 0, "fraction": 0.5, "reducer": "kcenter"}, {"layer": 4, "fraction": 0.25}]
SCORES = {f"a{k}": int(k % 3 > 0) for k in range(9)}
METHODS = [
    ("condiv", 0.75, {"power": 0.3, "merge": True}),
    ("kcenter", 0.75, {"tower_ratio": 0.5, "tower_reducer": "uniform"}),
    ("auto", {"image": 0.5, "video": 0.9}, {}),
    ("auto", "budget=prompt=40", {}),
    ("plan", 0.65625, {"plan": PLAN}),
]


def printed(*args, width: int = 80, **how) -> str:
    console = Console(file=io.StringIO(), width=width)
    print_fitted(console, *args, **how)
    return console.file.getvalue()


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
    assert "…" not in out and all(len(line) <= 80 for line in out.splitlines()[:-1])
    with files[0].open() as file:
        rows = list(csv.DictReader(file))
    first = out.partition("Differences")[0]
    for row in rows:
        assert all(word in first for word in row["method"].split())
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


def test_columns_that_do_not_fit_are_named():
    names = ("method", "reached", "items", "accuracy")
    rows = [("a method of several words", "0.123", "123456", "97.65%")]
    how = {"least": ("reached", "items"), "elsewhere": "See there."}
    assert "Not shown" not in printed(names, rows, width=60, **how)
    narrow = printed(names, rows, width=26, **how)
    assert "reached" not in narrow.partition("Not shown")[0]
    assert "123456" in narrow and "97.65%" in narrow
    assert "Not shown, too wide: reached. See there." in " ".join(narrow.split())
    assert {"a", "method", "of", "several", "words"} <= {*narrow.split()}


def test_words_of_rich_texts_and_long_paths_stay_in_their_column():
    out = printed(("method", "n"), [(Text("x" * 100), "12"), ("short", "7")], width=40)
    assert out.count("x") == 100 and max(map(len, out.splitlines())) <= 40


def test_names_of_models_are_whole(capsys):
    assert run("list", "models") == 0
    words = capsys.readouterr().out.split()
    assert {"LLaVA-NeXT-Video", "llava_next_video", "tiny-llava-onevision"} <= {*words}


def test_columns_come_in_blocks_that_begin_with_the_first():
    console = Console(file=io.StringIO(), width=40)
    columns = [[f"method{k}\n0.5", f"{k}.5 ms"] for k in range(9)]
    print_beside(console, ("", "total"), columns, title="model")
    blocks = console.file.getvalue().strip("\n").split("\n\n")
    assert all(len(line) <= 40 for line in console.file.getvalue().splitlines())
    heads = [re.findall(r"method\d", block) for block in blocks]
    assert len(blocks) > 1 and {h[0] for h in heads} == {"method0"}
    assert [name for h in heads for name in h[1:]] == [f"method{k}" for k in range(1, 9)]
    times = [re.findall(r"\d\.5 ms", block) for block in blocks]
    assert [[f"{h[6:]}.5 ms" for h in head] for head in heads] == times


def test_the_total_of_a_profile_says_what_it_leaves_out(capsys):
    """200 + 50 + 150 ms, without the 900 ms of the row above them."""
    row = {key: 0.0 for _, key, _ in LINES} | {"reducer": "full", "ratio": 0}
    row |= {"preprocess_s": 0.9, "vision_s": 0.2, "reduce_s": 0.05, "prefill_s": 0.15}
    row |= {"total_s": 0.4, "tokens_per_layer": [64]}
    hardware = {"gpus": ["a GPU"], "cpu": "", "threads": 1}
    show({"model": "tiny", "rows": [row], "file": None, "hardware": hardware})
    assert re.search(r"total after preprocess +400\.0 ms", capsys.readouterr().out)


def test_a_profile_of_many_methods_fits(capsys):
    values = {key: 0.123 for _, key, _ in LINES} | {"tower_ratio": 0.0, "peak_bytes": None}
    rows = [
        {"reducer": f"method{k}", "ratio": 0.75, **values, "tokens_per_layer": [*range(64, 36, -1)]}
        for k in range(20)
    ]
    hardware = {"gpus": ["a GPU"], "cpu": "", "threads": 1}
    show({"model": "tiny", "rows": rows, "file": None, "hardware": hardware})
    out = capsys.readouterr().out
    assert "…" not in out and all(len(line) <= 80 for line in out.splitlines())
    assert {f"method{k}" for k in range(20)} == {*re.findall(r"method\d+", out)}
    assert "tower ratio reached" not in out and out.count("123.0 ms") >= 20 * 6
