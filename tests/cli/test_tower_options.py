"""--tower-ratio and --tower-reducer, and plans with a stage in the tower: what commands ask for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.console import run

import tokencomp
from tokencomp.evaluation import patches, tuning
from tokencomp.lmms import tasks as benchmarks
from tokencomp.zoo import SAMPLES

IMAGE = next(SAMPLES.glob("*.jpg"))
OPTIONS = ("-r", "uniform", "--ratio", "0.75", "--tower-ratio", "auto", "--tower-reducer", "random")
STAGES = [
    {"tower": 0, "fraction": 0.5, "reducer": "kcenter", "options": {"pool": 2}},
    {"layer": 0, "fraction": 0.25, "reducer": "uniform", "options": {}},
]


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> list[tokencomp.Plan]:
    """The plan of every patch that a command applies."""
    calls, real = [], patches.apply

    def apply(model: Any, spec: Any) -> Any:
        handle = real(model, spec)
        calls.append(handle.plan)
        return handle

    monkeypatch.setattr(patches, "apply", apply)
    return calls


@pytest.mark.parametrize("command", ["inspect", "profile"])
def test_a_plan_may_begin_in_the_tower(
    command: str, folder: Path, tmp_path: Path, plans: list[tokencomp.Plan]
) -> None:
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(STAGES))
    more = ("--rounds", 1) if command == "profile" else ("-o", tmp_path / "out.html")
    assert run(command, "--model", folder, "--image", IMAGE, "--plan", file, *more) == 0
    expected = tokencomp.plan_from_json(STAGES)
    assert plans and all(plan == expected for plan in plans)
    plans.clear()
    assert run(command, "--model", folder, "--image", IMAGE, *OPTIONS, *more) == 0
    towers = [plan.tower for plan in plans]
    assert towers and all(t is not None and t.reducer.name == "random" for t in towers)
    assert [t.fraction for t in towers if t] == pytest.approx([0.4] * len(towers))


def test_eval_passes_the_stage_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(benchmarks, "check_installed", lambda: None)
    monkeypatch.setattr(benchmarks, "find_tasks", lambda *args: [])
    monkeypatch.setattr(benchmarks, "run_setting", lambda a, b, c, s, *d, **e: calls.append(s))
    monkeypatch.setattr("tokencomp.cli.eval._print", lambda *args: None)
    given = ("--model", folder, "-o", tmp_path / "runs", "--no-baselines")
    assert run("eval", *given, *OPTIONS) == 0
    full, chosen = calls
    assert full.dropped_cells == 0
    assert chosen.dropped_cells == pytest.approx(0.6) and chosen.tower_reducer == "random"


def test_tune_passes_the_stage_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(tuning, "search", lambda m, p, q, found, **how: calls.extend(found) or [])
    given = ("--tokens", 64, "--model", folder, "--items", 1, "--families", "needle")
    more = ("--frames", 4, "--scale", 1, "--json")
    assert run("tune", *given, *OPTIONS, *more) == 0
    settings = [candidate.setting for candidate in calls if candidate.setting.active]
    assert settings
    assert all((s.tower_ratio, s.tower_reducer) == ("auto", "random") for s in settings)
