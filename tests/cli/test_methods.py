"""--reducer, --plan, --set and --merge: what the commands ask `patch` for."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from support.console import run

import tokencomp
from tokencomp import Plan, Stage
from tokencomp.cli._parse import ratios
from tokencomp.errors import OptionError, RatioError
from tokencomp.evaluation import Setting, patches, tuning
from tokencomp.inputs import loading
from tokencomp.lmms import tasks as benchmarks
from tokencomp.zoo import SAMPLES

IMAGE = next(SAMPLES.glob("*.jpg"))
SHORT = {"inspect": ("--max-new-tokens", 2), "profile": ("--rounds", 1)}
COMPOSED = {"weighted": False, "share": 0.7, "prune.score": "last_query"}
SETS = [f"--set={name}={json.dumps(value)}" for name, value in COMPOSED.items()]
STAGES = [
    {"layer": 0, "fraction": 0.5, "reducer": "bipartite", "options": {"weighted": False}},
    {"layer": 3, "fraction": 0.25, "reducer": "uniform", "options": {}},
]


def commands(quick: str) -> pytest.MarkDecorator:
    """Every command; they share the code, so plain pytest runs one of them."""
    marked = [pytest.param(c, marks=[] if c == quick else [pytest.mark.long]) for c in SHORT]
    return pytest.mark.parametrize("command", marked)


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
def file(tmp_path: Path) -> Path:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(STAGES))
    return path


def ask(command: str, folder: Path, tmp_path: Path, *args: object) -> int:
    output = tmp_path / ("out.json" if command == "profile" else "out.html")
    given = ("--model", folder, "--image", IMAGE, *SHORT[command], "-o", output)
    return run(command, *given, *args)


@commands("inspect")
def test_ratios_by_modality_of_media(command, folder, tmp_path, specs, capsys):
    ratio = "0.5;image=0.75,video=0.5"
    assert ask(command, folder, tmp_path, "-r", "divprune", "--ratio", ratio) == 0
    ratio_texts = list(dict.fromkeys(spec.shown_ratio for spec, _ in specs))
    assert ratio_texts == ["0.5", "image=0.75,video=0.5"]
    plan = specs[-1][1]
    assert [(s.layer, s.fraction_of("image"), s.fraction_of("audio")) for s in plan.stages] == [
        (0, 0.25, 1.0)
    ]


@commands("inspect")
def test_every_reducer_has_options_of_its_own(command, folder, tmp_path, specs, capsys):
    """--set is for all that are named; a reducer's own options come first."""
    named = "condiv(power=0.5, margin=0.1),kcenter,condiv"
    assert ask(command, folder, tmp_path, "-r", named, "--ratio", "0.5") == 0
    found = {(str(spec.reducer), *sorted(spec.options.items())) for spec, _ in specs}
    assert found == {("condiv", ("margin", 0.1), ("power", 0.5)), ("kcenter",), ("condiv",)}
    specs.clear()
    named = ("-r", "condiv(power=0.5),condiv", "--set", "power=2", "--ratio", "0.5")
    assert ask(command, folder, tmp_path, *named) == 0
    assert {spec.options["power"] for spec, _ in specs} == {0.5, 2}


@pytest.mark.parametrize("text", ["condiv(power=2", "condiv(power)", "(power=2)", "condiv)"])
def test_bad_texts_of_reducers(text, capsys):
    assert run("demo", "--reducer", text) == 2
    err = capsys.readouterr().err
    assert "NAME" in err or "Did you mean" in err or "unknown" in err.lower()


@commands("profile")
def test_budgets_in_tokens(command, folder, tmp_path, specs, capsys):
    assert ask(command, folder, tmp_path, "-r", "divprune", "--budget", "16,prompt=24") == 0
    texts = list(dict.fromkeys(spec.shown_ratio for spec, _ in specs))
    assert texts == ["budget=16", "budget=prompt=24"]
    assert "budget=16" in capsys.readouterr().out


def test_bad_budgets(folder, tmp_path, capsys):
    for wrong in ("0", "1.5", "many", "image=4", "prompt=", "-3", "10000000"):
        assert ask("inspect", folder, tmp_path, "--budget", wrong) == 2
        assert "budget" in capsys.readouterr().err
    assert ask("inspect", folder, tmp_path, "--budget", "16", "--ratio", "0.5") == 2
    assert "--ratio: no effect with --budget" in capsys.readouterr().err
    assert run("serve", "--budget", "16", "--ratio", "0.5") == 2
    assert "--ratio: no effect with --budget" in capsys.readouterr().err
    with pytest.raises(OptionError, match="makes all media smaller by one ratio"):
        Setting("downscale", budget=16)


@pytest.mark.parametrize(
    ("text", "settings"),
    [
        ("0.5, 0.75,0.5", [0.5, 0.75]),
        ("video=0.75,audio=0.5", [{"video": 0.75, "audio": 0.5}]),
        ("0.5;video = 0.75;0.5;image=0", [0.5, {"video": 0.75}, {"image": 0.0}]),
    ],
)
def test_texts_of_ratios(text, settings):
    assert ratios(text) == settings


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("0.5,video=0.75", OptionError, "numbers and modalities in one setting"),
        ("video=0.5,video=0.6", OptionError, "gives video twice"),
        ("sound=0.5", RatioError, "'sound' is no modality. Use image, video, audio"),
        ("video=1.5", RatioError, "ratio of video='1.5': expected a number in"),
        ("video=", RatioError, "ratio of video=''"),
        ("0.5;", OptionError, "expected one or more names"),
    ],
)
def test_bad_texts_of_ratios(text, error, message):
    with pytest.raises(error, match=message):
        ratios(text)


def test_ratios_by_modality_where_one_number_counts(capsys):
    """Servers and the search for a budget have one ratio; so have input baselines."""
    for command in (("serve",), ("tune", "--tokens", "9")):
        assert run(*command, "--ratio", "video=0.5") == 2
        assert "takes one number for all modalities" in capsys.readouterr().err
    with pytest.raises(OptionError, match="makes all media smaller by one ratio"):
        Setting("downscale", {"video": 0.5})


@commands("inspect")
def test_a_composition(command, folder, tmp_path, specs, capsys):
    code = ask(
        command, folder, tmp_path,
        "-r", "bipartite+prune", "--ratio", "0.6", *SETS,
    )  # fmt: skip
    assert code == 0 and "bipartite+prune" in capsys.readouterr().out
    stages = tokencomp.make_reducer("bipartite+prune", **COMPOSED).plan(0.6, 6)
    setting = Setting("bipartite+prune", 0.6, COMPOSED)
    assert specs and all(call == (setting, stages) for call in specs)


@commands("inspect")
def test_the_rest(command, folder, tmp_path, specs, capsys):
    args = ("-r", "kcenter", "--ratio", "0.5", "--merge")
    assert ask(command, folder, tmp_path, *args) == 0
    assert "kcenter" in capsys.readouterr().out
    stage = Stage(0, 0.5, tokencomp.make_reducer("kcenter"), merge=True)
    setting, stages = Setting("kcenter", 0.5, {"merge": True}), Plan((stage,))
    assert specs and all(call == (setting, stages) for call in specs)


@commands("profile")
def test_a_plan_from_a_file(command, folder, tmp_path, file, specs, capsys):
    """64 tokens: three layers see half of them, three a quarter, so 0.625 of the work is saved."""
    code = ask(command, folder, tmp_path, "--plan", file)
    out = capsys.readouterr().out
    assert code == 0 and re.search(r"plan\s[\s\S]*0\.625", out) and "32×3 16×3" in out
    plan = tokencomp.plan_from_json(STAGES)
    assert specs and all(stages == plan for _, stages in specs)


@pytest.mark.parametrize("command", SHORT)
def test_missing_weights_are_told_before_any_work(command, folder, tmp_path, capsys):
    assert ask(command, folder, tmp_path, "-r", "uniform,ccam", "--ratio", "0.5") == 2
    said = capsys.readouterr()
    assert "tokencomp train ccam" in said.err and not said.out.strip()


@pytest.mark.parametrize("merging", [False, True])
def test_eval(merging, folder, tmp_path, file, monkeypatch):
    """Its settings reach lmms-eval as objects; what is stored of them gives them back."""
    calls = []

    def run_setting(loaded, name, tasks, setting, out, **how):
        stored = json.loads(json.dumps(setting.identity))
        assert Setting(*[stored[k] for k in ("reducer", "ratio", "options")]) == setting
        calls.append((setting, out.name))

    monkeypatch.setattr(benchmarks, "check_installed", lambda: None)
    monkeypatch.setattr(benchmarks, "find_tasks", lambda *args: [])
    monkeypatch.setattr(benchmarks, "run_setting", run_setting)
    monkeypatch.setattr("tokencomp.cli.eval._print", lambda *args: None)
    uniform = {"reducer": "uniform", "options": {}}
    stored = [{**stage, **uniform, "merge": True} for stage in STAGES] if merging else STAGES
    file.write_text(json.dumps(stored))
    assert run("eval", "--model", folder, "--plan", file, "-o", tmp_path / "runs") == 0
    (full, _), (random, _), *others, (even, _), (small, _), (plan, name) = calls
    assert [s for s, _ in others] == [Setting("random", 0.625, {"seed": k}) for k in (1, 2)]
    assert full == Setting()
    assert random == Setting("random", 0.625) and small == Setting("downscale", 0.625)
    assert even == Setting("uniform", 0.625)
    stages = tokencomp.plan_from_json(stored)
    assert plan.ratio == 0.625 and name == "plan-0.625"
    assert plan.plan == stages and stages.may_merge is merging
    calls.clear()
    args = ("-r", "bipartite+prune", "--ratio", "0.5", "--set", "share=0.7", "--no-baselines")
    assert run("eval", "--model", folder, *args, "-o", tmp_path / "runs") == 0
    assert [s for s, _ in calls] == [Setting(), Setting("bipartite+prune", 0.5, {"share": 0.7})]


def test_all_reducers_that_fit(folder, tmp_path, monkeypatch, capsys):
    """Every registered one at every ratio, but for those that this model or --merge refuses."""
    calls = []
    monkeypatch.setattr(benchmarks, "check_installed", lambda: None)
    monkeypatch.setattr(benchmarks, "find_tasks", lambda *args: [])
    monkeypatch.setattr(benchmarks, "run_setting", lambda *args, **how: calls.append(args[3]))
    monkeypatch.setattr("tokencomp.cli.eval._print", lambda *args: None)
    given = ("eval", "--model", folder, "-o", tmp_path / "runs", "-r", "all")
    assert run(*given, "--ratio", "0.5,0.75") == 0
    names, said = {s.reducer for s in calls}, capsys.readouterr().err
    left_out = set(tokencomp.available_reducers()) - names
    assert left_out == {
        name for name in tokencomp.available_reducers() if f"left out: {name}, because" in said
    }
    assert {"auto", "random", "uniform", "downscale", "divprune", "prune", "vcast"} <= names
    assert "ccam" in left_out and "tokencomp train ccam" in said
    active = [s for s in calls if s.active and not s.options]
    assert len(active) == 2 * len(names - {"downscale", "full"})
    assert len([s for s in calls if s.reducer == "random"]) == 2 * 3
    calls.clear()
    assert run(*given, "--ratio", "0.5", "--merge", "--no-baselines") == 0
    merging = {s.reducer for s in calls}
    assert "divprune" in merging and merging.isdisjoint({"bipartite", "pool", "fusion"})
    assert run(*given, "--set", "seed=1") == 2
    assert "condiv(power=2)" in capsys.readouterr().err
    assert run(*given[:-1], "all,ccam") == 2


TUNE = ("tune", "--tokens", 64, "--items", 1, "--families", "needle", "--frames", 4, "--scale", 1)


def test_tune_with_a_composition(folder, tmp_path):
    out = tmp_path / "tuned.json"
    code = run(*TUNE, "--model", folder, "-r", "bipartite+prune", "--ratio", "0.5", "-o", out)
    found = json.loads(out.read_text())["candidates"]
    assert code == 0 and {c["reducer"] for c in found} == {"bipartite+prune"}
    assert all(c["tokens"] == pytest.approx(64, abs=2) for c in found)


def test_tune_with_the_rest(folder, monkeypatch):
    calls = []
    monkeypatch.setattr(tuning, "search", lambda m, p, q, found, **how: calls.extend(found) or [])
    given = ("-r", "kcenter", "--ratio", "0.5", "--merge", "--json")
    assert run(*TUNE, "--model", folder, *given) == 0
    active = [c.setting for c in calls if c.setting.active]
    assert active and all(s.merge is True and s.reducer == "kcenter" for s in active)


@pytest.mark.parametrize("command", ["inspect", "profile", "demo", "eval", "tune"])
@pytest.mark.parametrize(
    ("reducer", "message"),
    [
        ("prune+bipartite", "'prune' does not act at decoder entry"),
        ("bipartit+prune", "Did you mean 'bipartite'"),
        ("bipartite+downscale", "unknown reducer 'downscale'"),
    ],
)
def test_parts_that_do_not_go_together(command, reducer, message, capsys):
    tokens = ["--tokens", 9] if command == "tune" else []
    assert run(command, "-r", reducer, *tokens) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("command", ["inspect", "profile", "demo", "eval"])
@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--plan", "FILE", "-r", "bipartite"], "--reducer: no effect with --plan"),
        (["--plan", "FILE", "--ratio", "0.5", "--set", "a=1"], "--ratio, --set: no effect with"),
        (["--plan", "nowhere.json"], "plan file 'nowhere.json'"),
        (["-r", "bipartite", "--set", "name=x"], "no option 'name'"),
        (["-r", "bipartite", "--set", "reducers=x"], "no option 'reducers'"),
        (["-r", "bipartite", "--set", "plan=x"], "no option 'plan'"),
        (["--merge", "-r", "pool"], "'pool' merges tokens by itself"),
        (["--plan", "FILE", "--merge"], "--merge: no effect with --plan"),
    ],
)
def test_mistakes(command, args, message, file, capsys):
    assert run(command, *[file if a == "FILE" else a for a in args]) == 2
    err = capsys.readouterr().err
    assert message in err and err.startswith("error: ") and "Traceback" not in err


def test_a_plan_of_a_deeper_model(folder, tmp_path, file, capsys):
    """Its stage lies outside: without a check, the model would run uncompressed as a "plan"."""
    file.write_text(json.dumps([{"layer": 9, "fraction": 0.5, "reducer": "bipartite"}]))
    assert ask("inspect", folder, tmp_path, "--plan", file) == 2
    assert "6 layers" in capsys.readouterr().err


def test_settings_refuse_what_patch_would(loaded):
    uniform = [{"layer": 0, "fraction": 0.5, "reducer": "uniform"}]
    more = {"merge": True}
    for reducer, options in (
        ("plan", {"plan": uniform, **more}),
        ("plan", {"plan": uniform, "seed": 1}),
        ("plan", {}),
        ("bipartite", more),
        ("downscale", more),
    ):
        with pytest.raises(tokencomp.TokenCompError):
            Setting(reducer, 0.5, options)


def test_load_model_is_not_needed_for_mistakes(monkeypatch, file, capsys):
    monkeypatch.setattr(loading, "load_model", None)
    assert run("inspect", "--image", IMAGE, "--plan", file, "-r", "bipartite") == 2
    assert run("eval", "-r", "prune+bipartite") == 2
