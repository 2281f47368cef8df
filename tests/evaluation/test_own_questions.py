"""`tokencomp eval --data questions.jsonl`: the user's own questions and media."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from support.console import run

from tokencomp.evaluation.group_runs import find_runs
from tokencomp.inputs.prompts import build_inputs, generate
from tokencomp.pages.report import lines

SETTINGS = ("full", "random-0.75", "random-0.75-seed=1", "random-0.75-seed=2", "uniform-0.75",
            "downscale-0.75", "condiv-0.75")  # fmt: skip


@pytest.fixture
def questions(examples, loaded, tmp_path) -> tuple[Path, list[str]]:
    """A file of four lines, one of them blank, and what the full model answers to each."""
    said, lines = [], []
    for k, e in enumerate(examples[:2] + examples[3:4]):
        said.append(generate(*loaded, build_inputs(loaded[1], [e.load(8)], [e.prompt]), 16)[0])
        answer = said[-1] if k else "something else"
        lines.append(json.dumps({"question": e.prompt, "answer": answer, "media": str(e.media[0])}))
    file = tmp_path / "my.jsonl"
    file.write_text("\n".join([lines[0], "", *lines[1:]]) + "\n")
    return file, said


@pytest.fixture
def evaluate(questions, folder, tmp_path) -> Callable[..., int]:
    def call(*more: object) -> int:
        known = ("--data", questions[0], "--model", folder, "--ratio", "0.75", "--device", "cpu")
        return run("eval", *known, "-o", tmp_path / "runs", *more)

    return call


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]


def test_every_baseline_answers_and_the_report_has_intervals(questions, evaluate, tmp_path, capsys):
    assert evaluate("-r", "condiv") == 0
    assert {p.name for p in (tmp_path / "runs").iterdir()} == set(SETTINGS)
    rows = records(tmp_path / "runs" / "full")
    assert [r["prediction"] for r in rows] == questions[1]
    assert [r["correct"] for r in rows] == [False, True, True]
    for name in SETTINGS[1:]:
        assert all(abs(r["ratio"] - 0.75) < 0.1 for r in records(tmp_path / "runs" / name)), name
    capsys.readouterr()
    table = {line.run.label: line for line in lines(find_runs([tmp_path / "runs"]))}
    assert table["full"].accuracy == pytest.approx(2 / 3)
    assert table["condiv"].retention.items == 3
    assert table["condiv"].comparisons.seeds == 3


def test_a_limit_shows_the_items_of_this_call(questions, evaluate, tmp_path, capsys):
    """Folders of an earlier call hold three answers; now the first one alone is asked, and wrong.

    The full model answers 0 of 1 right, and not 2 of 3.
    """
    plain = ("--no-baselines", "-r", "uniform")
    assert evaluate(*plain) == 0
    capsys.readouterr()
    assert evaluate(*plain, "--limit", 1) == 0
    row, *_ = [line for line in capsys.readouterr().out.splitlines() if line.startswith("full")]
    assert row.split()[:5] == ["full", "0", "0.000", "1", "0.0%"]
    assert len(records(tmp_path / "runs" / "full")) == 3


def test_budgets_stand_beside_ratios(questions, evaluate, folder, tmp_path, capsys):
    """Baselines have the same budgets, and the report takes runs of both kinds."""
    assert evaluate("--no-baselines", "-r", "uniform") == 0
    runs, known = tmp_path / "runs", ("--data", questions[0], "--model", folder, "--device", "cpu")
    assert run("eval", *known, "-r", "uniform", "--budget", "32,9", "-o", runs, "--seeds", 1) == 0
    assert {p.name for p in runs.iterdir()} == {
        "full", "uniform-0.75", *(f"{r}-budget={n}" for r in ("random", "uniform") for n in (9, 32))
    }  # fmt: skip
    for n in (9, 32):
        rows = [records(runs / f"{name}-budget={n}") for name in ("random", "uniform")]
        assert [r["ratio"] for r in rows[0]] == [r["ratio"] for r in rows[1]]
    assert run("report", runs, "-o", tmp_path / "page.html") == 0
    table = find_runs([runs])
    assert [r.ratio for r in table if r.label == "uniform"] == [0.75, "budget=9", "budget=32"]


def test_answers_end_at_a_limit_that_runs_do_not_mix(questions, evaluate, tmp_path, capsys):
    plain = ("--no-baselines", "-r", "uniform")
    assert evaluate(*plain) == 0
    line = json.loads(questions[0].read_text().split("\n")[0])
    questions[0].write_text(json.dumps({**line, "answer": "red"}) + "\n")
    assert evaluate(*plain, "--max-new-tokens", 4, "-o", tmp_path / "four") == 0
    (row,) = records(tmp_path / "four" / "full")
    assert questions[1][0].startswith(row["prediction"]) and row["prediction"] != questions[1][0]
    capsys.readouterr()
    both = tmp_path / "runs" / "full", tmp_path / "four" / "full"
    assert run("report", *both, "-o", tmp_path / "page.html") == 2
    assert "max_new_tokens: 16 and 4" in capsys.readouterr().err.replace("\n", " ")


def test_questions_that_no_answer_within_the_limit_can_meet(
    questions, loaded, evaluate, tmp_path, capsys
):
    """One word of the tokenizer per token: 17 and 20 of them, and other answers that are short."""
    words = " ".join(["red"] * 20)
    assert len(loaded[1].tokenizer(words)["input_ids"]) == 20
    line = json.loads(questions[0].read_text().split("\n")[0])
    answers = [["red", words], f"B. {words}", words[:-12], words]
    rows = [{**line, "answer": one, "id": f"number {k}"} for k, one in enumerate(answers)]
    questions[0].write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert evaluate("-r", "uniform") == 2
    said = capsys.readouterr().err.replace("\n", " ")
    assert "'number 2'" in said and "--max-new-tokens 20" in said
    assert not (tmp_path / "runs").exists()
    assert evaluate("-r", "uniform", "--max-new-tokens", 19) == 2
    assert "'number 3'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("questions.csv", "no such file"),
        ("more/questions", "no such folder"),
        ("empty", "neither questions.jsonl, with your questions, nor"),
        ("table.csv", "line 1: expected a JSON object with question, answer and media"),
        ("blank.jsonl", "is empty: expected one JSON object per line"),
    ],
)
def test_paths_that_hold_no_questions_say_so_before_tasks_are_looked_for(
    folder, tmp_path, name, message, capsys
):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a.png").touch()
    (tmp_path / "table.csv").write_text("question,answer,media\n")
    (tmp_path / "blank.jsonl").write_text("\n")
    assert run("eval", "--data", tmp_path / name, "--model", folder) == 2
    assert message in capsys.readouterr().err.replace("\n", " ")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("not json", "this line is not JSON"),
        ('{"question": "q", "media": "m.png"}', "'answer' is missing"),
        ('{"question": "q", "answer": ["a", " "], "media": "m.png"}', "the answer is empty"),
        ('{"question": "q", "answer": [["a"]], "media": "m.png"}', "a list inside"),
        ('{"question": "q", "answer": "a", "media": []}', "there is no image or video"),
    ],
)
def test_a_bad_line_is_one_message_with_its_number(questions, evaluate, line, message, capsys):
    first, blank, *_ = questions[0].read_text().split("\n")
    questions[0].write_text(f"{first}\n{blank}\n{line}\n")
    assert evaluate() == 2
    err = capsys.readouterr().err.replace("\n", " ")
    assert message in err and "my.jsonl, line 3" in err
