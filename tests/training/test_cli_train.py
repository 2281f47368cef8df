"""`tokencomp train ...` from the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tokencomp.cli import main


@pytest.fixture(scope="module")
def folder(tiny: Any) -> str:
    return tiny[0].config._name_or_path


def run(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    code = 0
    try:
        main(args)
    except SystemExit as stop:
        code = int(stop.code or 0)
    told = capsys.readouterr()
    return code, told.out, told.err


def test_each_command_trains_and_says_how_to_use_the_result(
    folder: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("peft")
    common = ("--model", folder, "--data", data, "--batch", "2", "--evaluate", "2")
    common = (*common, "--samples", "4", "--device", "cpu")
    for command, extra, file in (
        ("selector", ("--epochs", "1", "--held-out", "2"), "selector.json"),
        ("adsc", ("--steps", "2", "--schedule", "0.5"), "tokencomp.json"),
        ("ccam", ("--steps", "2", "--queries", "3", "--align", "1"), "ccam.json"),
    ):
        output = tmp_path / command
        code, out, _ = run(capsys, "train", command, *common, *extra, "--output", str(output))
        assert code == 0 and "random" in out
        assert json.loads((output / file).read_text())["model_type"] == "qwen2_vl"


def test_mistakes_end_in_one_message_and_leave_nothing(
    folder: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for args, told in (
        (("adsc", "--schedule", "0.5,2"), "ratio"),
        (("adsc", "--reducer", "adcs"), "adsc"),
        (("selector", "--answers", "none"), "generated"),
        (("ccam", "--data", "nothing.jsonl"), "questions.jsonl"),
    ):
        output = tmp_path / "none"
        code, _, err = run(capsys, "train", *args, "--model", folder, "--output", str(output))
        assert code == 2 and "error:" in err and told in err
        assert not output.exists()
