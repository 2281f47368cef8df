"""The console script: what it prints, what it writes, how it fails."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import typer
from support.console import run

from tokencomp.cli._app import build_app

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    """So that no cell of a table wraps."""
    monkeypatch.setenv("COLUMNS", "400")


def test_list_says_what_a_reducer_changes(capsys):
    assert run("list", "visionzip") == 0
    assert "2412.04467" in capsys.readouterr().out


def test_list_is_generated_from_the_registries(capsys):
    from tokencomp import available_models, available_reducers

    assert run("list") == 0
    out = capsys.readouterr().out
    rows = [re.split("  +", line) for line in out.splitlines()]
    first = {row[0].removesuffix(" (default)"): row for row in rows}
    assert {*available_reducers(), "downscale", "fewer_frames", "native"} <= {*first}
    assert first["bipartite"][1:3] == ["entry", "yes"] and first["aim"][1] == "entry + layers"
    assert first["scope"][2] == "saliency=none" and first["prune"][2] == "–"
    assert set(available_models()) <= set(re.findall(r"\w+", out.partition("Models")[2]))
    assert re.search(r"^Qwen2-VL .* 5\.6\.0, .*\ntiny-qwen2-vl ", out, re.M)


def test_doctor_proves_that_layers_saw_fewer_tokens(folder, capsys, monkeypatch):
    monkeypatch.setattr(torch, "__version__", f"{torch.__version__.partition('+')[0]}+cu132")
    assert run("doctor", "--model", folder) == 0
    out = capsys.readouterr().out
    assert re.search(r"ok +uniform: layers see fewer tokens .* ratio 0\.500", out)
    assert re.search(r"ok +prune: equals the masked run", out) and torch.__version__ in out


def test_doctor_says_what_is_broken(folder, capsys, monkeypatch):
    """A patch that does nothing must be found out."""
    from tokencomp.engine import hooks

    monkeypatch.setattr(hooks.Hooks, "install", lambda self: None)
    assert run("doctor", "--model", folder) == 1
    out = capsys.readouterr().out
    assert "broken" in out and "uncompressed" in out


@pytest.mark.long
def test_demo_in_short_answers_the_packaged_questions(folder, tmp_path, monkeypatch, capsys):
    from tokencomp.zoo import SAMPLES

    asked = json.loads((SAMPLES / "questions.json").read_text())
    monkeypatch.chdir(tmp_path)
    assert run("demo", "--model", folder) == 0
    out = capsys.readouterr().out
    rows = re.findall(
        r"^(full|random \(3 seeds\) 0\.75|auto 0\.75) +(\d+) +(\d+) of (\d+)", out, re.M
    )
    assert [row[0] for row in rows] == ["full", "random (3 seeds) 0.75", "auto 0.75"]
    assert {int(row[3]) for row in rows} == {len(asked)}
    before, *after = (int(row[1]) for row in rows)
    assert after == [pytest.approx(before / 4, abs=1)] * 2
    assert [out.count(f"\n{q['question']} ") for q in asked].count(1) == 3
    page = (tmp_path / "tokencomp-demo.html").read_text()
    assert "data:image/jpeg;base64," in page
    assert not re.search(r'(src|href)="(?!data:|#)', page), "the page loads nothing"


@pytest.mark.parametrize(
    "args, message",
    [
        (["demo", "--ratio", "1.5"], r"\[0, 1\)"),
        (["demo", "--reducer", "bipartit"], "Did you mean 'bipartite'"),
        (["inspect", "--image", "nowhere.png"], "no such file"),
        (["inspect", "--image", "x.png", "--frames", "best"], "names no frame policy"),
        (["serve", "--frames", "1fps"], "a server needs a number"),
        (["demo", "--model", "./nowhere"], "'./nowhere': no such folder"),
        (["serve", "--engine", "vllm", "--max-batch", "2"], "--max-batch: no effect with"),
        (["serve", "--engine", "vllm", "--image-max-tokens", "9"], "no effect with --engine vllm"),
        (["serve", "--ratio", "0.5", "--max-ratio", "0.2"], "ratio=0.5 is above max_ratio=0.2"),
        (["serve", "--reducer", "oracle"], "unknown reducer 'oracle'"),
    ],
)
def test_mistakes_end_in_one_clean_message(args, message, capsys):
    assert run(*args) == 2
    err = capsys.readouterr().err
    assert re.search(message, err) and "Traceback" not in err
    assert err.startswith("error: ")


def test_options_of_commands_on_pages_exist():
    """`--table` was listed as an option of `eval`, and is one of `report`: a long run lost its end.

    Of lines that call tokencomp, up to ` -- `; in the table of evaluation.md, options without a
    command are those of `eval`.
    """
    group, lines = typer.main.get_command(build_app()), []
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        lines += re.findall(r"(?:^|[`$ ])tokencomp ((?!-)[a-z]+ [^`\n]*)", text, re.MULTILINE)
    wanted = (
        (ROOT / "docs" / "evaluation.md").read_text().split("| I want to |")[1].split("\n\n")[0]
    )
    lines += [f"eval {span}" for span in re.findall(r"`(--[^`]+)`", wanted)]
    checked = 0
    for line in lines:
        name, *words = re.split(" -- | # ", line)[0].split()
        command = group.commands.get(name)
        flags = [re.split("[=,;.]", word)[0] for word in words if re.match("--[a-z]", word)]
        known = {o for p in getattr(command, "params", ()) for o in (*p.opts, *p.secondary_opts)}
        if command is not None and not hasattr(command, "commands"):
            checked += len(flags)
            assert [flag for flag in flags if flag not in known] == [], line
    assert checked > 60
