"""--reducer, --plan and --merge: what the commands ask `patch` for."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
from support.console import run
from support.stage_options import EXAMPLES

import tokencomp
from tokencomp import Plan, Stage
from tokencomp.evaluation import Setting, patches, tuning
from tokencomp.inputs import loading
from tokencomp.lmms import tasks as benchmarks
from tokencomp.zoo import SAMPLES

IMAGE = next(SAMPLES.glob("*.jpg"))
SHORT = {"inspect": ("--max-new-tokens", 2), "profile": ("--rounds", 1)}
COMPOSED = {"weighted": False, "share": 0.7, "prune.score": "last_query"}
WRITTEN = ",".join(f"{name}={json.dumps(value)}" for name, value in COMPOSED.items())
STAGES = [
    {"layer": 0, "fraction": 0.5, "reducer": "bipartite", "options": {"weighted": False}},
    {"layer": 3, "fraction": 0.25, "reducer": "uniform", "options": {}},
]
TOWER = [
    {"tower": 0, "fraction": 0.5, "reducer": "kcenter", "options": {"pool": 2}},
    {"layer": 0, "fraction": 0.25, "reducer": "uniform", "options": {}},
]


def kcenter_plan(**options) -> Plan:
    return Plan((Stage(0, 0.5, tokencomp.make_reducer("kcenter"), **options),))


@pytest.fixture
def specs(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """Spec and stages of every patch that a command applies."""
    calls, real = [], patches.apply

    def apply(model, spec):
        handle = real(model, spec)
        calls.append((spec, handle.plan))
        return handle

    monkeypatch.setattr(patches, "apply", apply)
    return calls


@pytest.fixture
def evaluated(monkeypatch: pytest.MonkeyPatch) -> list[Setting]:
    """The settings that `eval` gives to lmms-eval."""
    calls: list[Setting] = []
    monkeypatch.setattr(benchmarks, "check_installed", lambda: None)
    monkeypatch.setattr(benchmarks, "find_tasks", lambda *args: [])
    monkeypatch.setattr(benchmarks, "run_setting", lambda a, b, c, s, *d, **e: calls.append(s))
    monkeypatch.setattr("tokencomp.evaluation.group_runs.find_runs", lambda folders: [])
    monkeypatch.setattr("tokencomp.pages.report.lines", lambda runs: [])
    monkeypatch.setattr("tokencomp.cli._tables.print_lines", lambda console, table: None)
    return calls


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> list[Setting]:
    """The settings that `tune` compresses with."""
    calls: list[Setting] = []

    def search(model, processor, items, found, **how):
        calls.extend(candidate.setting for candidate in found if candidate.setting.active)
        return []

    monkeypatch.setattr(tuning, "search", search)
    return calls


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(STAGES))
    return path


def ask(command: str, folder: Path, tmp_path: Path, *args: object) -> int:
    output = () if command == "profile" else ("-o", tmp_path / "out.html")
    given = ("--model", folder, "--image", IMAGE, *SHORT[command], *output)
    return run(command, *given, *args)


def asked(specs: list[tuple]) -> set[tuple]:
    """Reducer, options and ratio of the patches, each once."""
    return {
        (str(spec.reducer), spec.shown_ratio, *sorted(spec.options.items())) for spec, _ in specs
    }


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (
            ("-r", "divprune", "--ratio", "0.5;image=0.75,video=0.5"),
            {("divprune", "0.5"), ("divprune", "image=0.75,video=0.5")},
        ),
        (
            ("-r", "divprune", "--budget", "16,prompt=24"),
            {("divprune", "budget=16"), ("divprune", "budget=prompt=24")},
        ),
        (
            ("-r", "condiv(power=0.5, margin=0.1),kcenter,condiv", "--ratio", "0.5"),
            {
                ("condiv", "0.5", ("margin", 0.1), ("power", 0.5)),
                ("kcenter", "0.5"),
                ("condiv", "0.5"),
            },
        ),
    ],
    ids=["by modality", "budgets", "options"],
)
def test_methods_and_ratios_reach_the_patch(folder, tmp_path, specs, args, expected):
    assert ask("inspect", folder, tmp_path, *args) == 0
    assert asked(specs) == expected


@pytest.mark.parametrize("command", SHORT)
@pytest.mark.parametrize(
    ("args", "plan"),
    [
        (
            ("-r", f"bipartite+prune({WRITTEN})", "--ratio", "0.6"),
            lambda: tokencomp.make_reducer("bipartite+prune", **COMPOSED).plan(0.6, 6),
        ),
        *(
            (
                ("-r", "kcenter", "--ratio", "0.5", f"--{name.replace('_', '-')}", word),
                functools.partial(kcenter_plan, **{name: value}),
            )
            for name, (word, value) in EXAMPLES.items()
        ),
        (("--plan", STAGES), lambda: tokencomp.plan_from_json(STAGES)),
        (("--plan", TOWER), lambda: tokencomp.plan_from_json(TOWER)),
    ],
    ids=["composition", *EXAMPLES, "plan", "plan with a tower"],
)
def test_the_plan_is_that_of_patch(command, folder, tmp_path, file, specs, args, plan):
    if args[0] == "--plan":
        file.write_text(json.dumps(args[1]))
        args = ("--plan", file)
    assert ask(command, folder, tmp_path, *args) == 0
    assert specs and all(found == plan() for _, found in specs)


def test_eval_has_baselines_of_the_ratio_of_a_plan(folder, tmp_path, file, evaluated):
    assert run("eval", "--model", folder, "--plan", file, "-o", tmp_path / "runs") == 0
    full, random, *others, even, small, plan = evaluated
    assert others == [Setting("random", 0.625, {"seed": k}) for k in (1, 2)]
    assert full == Setting()
    assert random == Setting("random", 0.625) and small == Setting("downscale", 0.625)
    assert even == Setting("uniform", 0.625)
    assert plan.ratio == 0.625 and plan.plan == tokencomp.plan_from_json(STAGES)
    stored = json.loads(json.dumps(plan.identity))
    assert Setting(*[stored[k] for k in ("reducer", "ratio", "options")]) == plan


TOWER_OPTIONS = ("-r", "uniform", "--tower-ratio", "auto", "--tower-reducer", "random")


def test_eval_and_tune_pass_all_parts_of_a_method_on(folder, tmp_path, evaluated, tried):
    out, questions = ("-o", tmp_path / "runs"), tmp_path / "questions.jsonl"
    line = {"question": "What?", "answer": "red", "media": str(IMAGE)}
    questions.write_text(json.dumps(line))
    tune = ("tune", "--model", folder, "--data", questions, "--tokens", 64, "--scale", 1)
    composed = ("-r", "bipartite+prune(share=0.7)", "--ratio", "0.5")
    assert run("eval", "--model", folder, *composed, "--no-baselines", *out) == 0
    assert evaluated == [Setting(), Setting("bipartite+prune", 0.5, {"share": 0.7})]
    evaluated.clear()
    given = (*TOWER_OPTIONS, "--ratio", "0.75")
    assert run("eval", "--model", folder, *given, "--no-baselines", *out) == 0
    assert evaluated[0].dropped_cells == 0
    assert evaluated[1].dropped_cells == pytest.approx(0.4)
    assert evaluated[1].tower_reducer == "random"
    assert run(*tune, *given, "--json") == 0
    assert tried and all((s.tower_ratio, s.tower_reducer) == ("auto", "random") for s in tried)
    tried.clear()
    assert run(*tune, "-r", "kcenter", "--ratio", "0.5", "--merge", "on") in (0, 1)
    assert tried and all(s.merge is True and s.reducer == "kcenter" for s in tried)


def test_all_reducers_that_fit(folder, tmp_path, evaluated, capsys):
    """Every registered one at every ratio, but for those that this model or --merge refuses."""
    given = ("eval", "--model", folder, "-o", tmp_path / "runs", "-r", "all")
    assert run(*given, "--ratio", "0.5,0.75") == 0
    names, said = {s.reducer for s in evaluated}, capsys.readouterr().err
    left_out = set(tokencomp.available_reducers()) - names
    assert left_out == {
        name for name in tokencomp.available_reducers() if f"left out: {name}, because" in said
    }
    assert {"auto", "random", "uniform", "downscale", "divprune", "prune", "vcast"} <= names
    active = [s for s in evaluated if s.active and not s.options]
    assert len(active) == 2 * len(names - {"downscale", "full"})
    assert len([s for s in evaluated if s.reducer == "random"]) == 2 * 3
    evaluated.clear()
    assert run(*given, "--ratio", "0.5", "--merge", "on", "--no-baselines") == 0
    merging = {s.reducer for s in evaluated}
    assert "divprune" in merging and merging.isdisjoint({"bipartite", "pool", "fusion"})


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["serve", "--ratio", "0.5;0.75"], "serve takes one ratio, got 2"),
        (
            ["tune", "--data", "x.jsonl", "--tokens", "9", "--ratio", "video=0.5"],
            "takes one number for all",
        ),
        (["demo", "-r", "condiv(power=2, power =3)"], "power is set twice"),
        (["serve", "-r", "uniform,random"], "serve takes one reducer, got 2"),
        (["demo", "-r", "prune+bipartite"], "must act at decoder entry"),
        (["eval", "--plan", "FILE", "-r", "bipartite"], "--reducer: no effect with --plan"),
        (["inspect", "--plan", "FILE", "--ratio", "0.5"], "--ratio: no effect with --plan"),
        (["inspect", "--plan", "FILE", "--merge", "on"], "--merge: no effect with --plan"),
        (["inspect", "--plan", "nowhere.json"], "plan file 'nowhere.json'"),
        (["inspect", "--merge", "on", "-r", "pool"], "'pool' merges tokens by itself"),
    ],
)
def test_mistakes_are_found_before_a_model_is_loaded(args, message, file, monkeypatch, capsys):
    monkeypatch.setattr(loading, "load_model", None)
    assert run(*[file if a == "FILE" else a for a in args]) == 2
    err = capsys.readouterr().err
    assert message in err and err.startswith("error: ") and "Traceback" not in err
