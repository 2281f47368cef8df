"""The report's table against statistics computed from the raw record files."""

from __future__ import annotations

import csv
import json
import re
import shutil
from pathlib import Path

import pytest
from support.console import run

from tokencomp.evaluation import Example, Setting, evaluate, mcnemar, retention
from tokencomp.evaluation.cost import Cost
from tokencomp.evaluation.group_runs import find_runs
from tokencomp.evaluation.metrics import McNemar
from tokencomp.pages.demo import saved
from tokencomp.pages.report import Line, lines

IDENTITY = {"model": "m", "dtype": "float32", "frames": 8}


def write_run(root: Path, reducer: str, ratio: float, scores: dict[str, int], **more) -> Path:
    """A run folder by hand."""
    folder = root / f"{reducer}-{ratio}"
    folder.mkdir(parents=True)
    identity = {**IDENTITY, "reducer": reducer, "ratio": ratio, "options": {}, **more}
    manifest = {
        "identity": identity, "finished": True, "command": "tokencomp eval", "date": "today",
        "commit": None, "versions": {"torch": "2"}, "batch_size": 8, "batch_halved_by_oom": False,
        "hardware": {"cpu": "c", "cores": 2, "threads": 1, "gpus": []},
    }  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(manifest))
    cost = {"ratio": ratio, "flops": 100 * (1 - ratio), "kv_bytes": 10, "seconds": 0.5}
    lines = [
        {"id": k, "family": k[0], "prediction": "", "answer": "", "correct": bool(v), **cost}
        for k, v in scores.items()
    ]
    lines.append({"id": "broken", "family": "a", "error": "no frame of this video"})
    (folder / "records.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    return folder


@pytest.fixture
def runs(tmp_path) -> Path:
    root = tmp_path / "runs"
    write_run(root, "full", 0.0, {"a1": 1, "a2": 1, "a3": 1, "b1": 0, "b2": 1, "b3": 1})
    write_run(root, "random", 0.5, {"a1": 0, "a2": 1, "a3": 0, "b1": 0, "b2": 0, "b3": 1})
    write_run(root, "aim", 0.5, {"b3": 1, "a1": 1, "a2": 1, "a3": 0, "b1": 1, "b2": 1})
    return root


def rows(*folders: Path) -> list[Line]:
    """The table of `tokencomp report`."""
    return lines(find_runs(folders))


def test_table_is_paired_by_item(runs):
    full, random, aim = rows(runs)
    assert (full.accuracy, random.accuracy, aim.accuracy) == (5 / 6, 2 / 6, 5 / 6)
    order = [1, 1, 0, 1, 1, 1], [1, 1, 1, 0, 1, 1]
    expected = retention(*order)
    assert aim.retention.value == expected.value == 1.0
    found = mcnemar([1, 1, 0, 1, 1, 1], [0, 1, 0, 0, 0, 1])
    assert aim.against_random == McNemar(3, 0, found.p) and found.p == 0.25
    assert aim.families == {"a": 2 / 3, "b": 1.0}
    assert len(aim.run.failed) == 1 and aim.flops == 0.5


def test_the_table_as_files_holds_the_same_numbers(runs, tmp_path, capsys):
    """CSV for programs, LaTeX for papers; the page loads nothing from elsewhere."""
    page, files = tmp_path / "r.html", (tmp_path / "t.csv", tmp_path / "t.tex")
    assert run("report", runs, "-o", page, "--table", files[0], "--table", files[1]) == 0
    with files[0].open() as file:
        full, random, aim = csv.DictReader(file)
    assert [float(row["accuracy"]) for row in (full, random, aim)] == [5 / 6, 2 / 6, 5 / 6]
    assert (full["retention"], aim["failed"], float(random["retention"])) == ("", "1", 2 / 5)
    assert float(aim["against_random"]) == pytest.approx(3 / 6)
    low, high = (100 * float(aim[f"retention_{end}"]) for end in ("low", "high"))
    assert rf"aim & 0.5 & 83.3\% & 100.0\% [{low:.1f}\%, {high:.1f}\%]" in files[1].read_text()
    content = page.read_text()
    assert not re.search(r'(src|href)="(?!data:|#)', content)
    assert "no frame of this video" in content, "what failed is named"


def strict(text: str) -> object:
    """Read JSON as other programs do, which know no NaN."""

    def refuse(word: str) -> None:
        raise AssertionError(word)

    return json.loads(text, parse_constant=refuse)


def test_what_has_no_value_is_a_dash_in_tables(tmp_path):
    """The full model answers nothing right, so that no share of it can be kept."""
    root, page, file = tmp_path / "r", tmp_path / "p.html", tmp_path / "t.tex"
    write_run(root, "full", 0.0, {"a1": 0, "a2": 0})
    write_run(root, "aim", 0.5, {"a1": 1, "a2": 0})
    assert run("report", root, "-o", page, "--table", file) == 0
    assert r"aim & 0.5 & 50.0\% & -- & -- & 50\% \\" in file.read_text().splitlines()
    assert not re.search(r"\bnan\b", re.sub("<svg.*?</svg>", "", page.read_text(), flags=re.S))


def test_the_manifest_of_a_run_without_answers_is_json(loaded, tmp_path):
    gone = [Example("0", "?", "x", (tmp_path / "gone.png",))]
    evaluate(*loaded, gone, out_dir=tmp_path / "o", progress=False)
    summary = strict((tmp_path / "o/manifest.json").read_text())["summary"]
    means = ("accuracy", "achieved_ratio", "flops", "kv_bytes")
    assert summary == {"items": 0, "failed": 1, **dict.fromkeys(means)}


def test_rows_and_shares_are_of_the_same_items(tmp_path):
    """The full model works 100 on a1 and 300 on a2; aim 30 on a1 and 90 on a2.

    Shares are 120 of 400 and not 60 of 300. Where a2 fails under aim, 30 of 100 are left.
    """

    def put(name, ratio, scores, flops, failed=()):
        folder = write_run(tmp_path / "r", name, ratio, scores)
        read = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
        costs = [{**row, "flops": n} for row, n in zip(read, flops, strict=False)]
        costs = [{"id": r["id"], "error": "big"} if r["id"] in failed else r for r in costs]
        text = [json.dumps(row) + "\n" for row in [*costs, read[-1]]]
        (folder / "records.jsonl").write_text("".join(text))
        return folder

    whole = put("full", 0.0, {"a1": 1, "a2": 1}, [100, 300])
    part = put("aim", 0.5, {"a1": 1, "a2": 0}, [30, 90])
    full, aim = rows(whole, part)
    assert (len(full.run.answered), full.accuracy) == (2, 1.0)
    assert (aim.flops, aim.kv_bytes, aim.accuracy) == (0.3, 1.0, 0.5)
    gone = put("prune", 0.5, {"a1": 1, "a2": 0}, [30, 90], failed=("a2",))
    *_, prune = rows(whole, gone)
    assert (prune.flops, len(prune.run.answered), len(prune.run.failed)) == (0.3, 1, 2)


def test_one_folder_by_two_names_is_one_run(runs, tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(runs)
    monkeypatch.chdir(tmp_path)
    once = rows(runs)
    again = rows(Path("runs"), runs, tmp_path / "link", Path("runs/aim-0.5"))
    assert [line.label for line in again] == [line.label for line in once]
    assert [line.comparisons.seeds for line in again] == [0, 0, 1]


def edit_records(folder: Path, **fields: object) -> None:
    """Give the record of question a2 other fields."""
    file = folder / "records.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows = [{**row, **(fields if row["id"] == "a2" else {})} for row in rows]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def edit_manifest(folder: Path, **fields: object) -> None:
    file = folder / "manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


REFUSED = {
    "another number of frames": (
        lambda runs: write_run(runs, "prune", 0.5, {"a1": 1}, frames=16),
        "differ in frames: 8 and 16",
    ),
    "other questions": (lambda runs: only(runs, "c1"), "are of different questions (7 and 1)"),
    "a part of the questions": (lambda runs: only(runs, "a1"), "are of different questions"),
    "two runs of one setting": (
        lambda runs: shutil.copytree(runs / "aim-0.5", runs / "again"),
        "are runs of one setting",
    ),
    "no full model": (lambda runs: shutil.rmtree(runs / "full-0.0"), "full model is missing"),
    "no run": (lambda runs: [shutil.rmtree(one) for one in runs.iterdir()], "no run folder"),
    "unfinished": (
        lambda runs: edit_manifest(runs / "aim-0.5", finished=False),
        "goes on where it stopped",
    ),
    **{
        field: (
            lambda runs, field=field: [
                edit_records(runs / name, **{field: name}) for name in ("full-0.0", "aim-0.5")
            ],
            f"differ in the {words} of question 'a2'",
        )
        for field, words in (
            ("media", "pictures, clips or sounds"),
            ("prompt", "words"),
            ("answer", "right answer"),
        )
    },
    "a record without a score": (
        lambda runs: (runs / "aim-0.5/records.jsonl").write_text('{"id": "a1", "prediction": ""}'),
        "lacks family or correct",
    ),
    "lost records": (
        lambda runs: edit_manifest(runs / "aim-0.5", summary={"items": 9, "failed": 1}),
        "records of 7 items, and its manifest says 10",
    ),
    "no identity": (
        lambda runs: edit_manifest(runs / "aim-0.5", identity={}),
        "reducer, ratio, options",
    ),
}


def only(runs: Path, name: str) -> None:
    """A run that answered this question alone."""
    file = write_run(runs, "prune", 0.5, {name: 1}) / "records.jsonl"
    file.write_text(file.read_text().splitlines()[0] + "\n")


@pytest.mark.parametrize("case", REFUSED)
def test_runs_that_cannot_be_compared_are_refused(runs, tmp_path, capsys, case):
    """The pictures of a question were replaced between two runs, say."""
    damage, message = REFUSED[case]
    damage(runs)
    assert run("report", runs, "-o", tmp_path / "x.html") == 2
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("kv", "words"),
    [
        ((100, 100), "the rest merged into them. That leaves 40% of the decoder's work and 100%"),
        ((100, 40), "merged into them in 50% of the prompts. That leaves 40% of the"),
        ((40, 40), "16 of 64 visual tokens on average. That leaves 40% of the decoder's work"),
    ],
)
def test_words_say_where_tokens_are_merged(kv, words):
    """A merged token is cached as often as the tokens that it stands for, a dropped one never."""
    costs = [Cost(64, [16, 16], 400, count) for count in kv]
    assert words in saved(Setting("auto", 0.75), costs, [Cost(64, [64, 64], 1000, 100)] * 2)
