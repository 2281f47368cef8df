"""The accuracy benchmark's tables and its choice, on results made up by hand."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from tests_support import FAMILIES
from torch import nn

import tokencomp
from tokencomp import make_reducer
from tokencomp.evaluation.settings import Setting

FOLDER = Path(__file__).parents[2] / "benchmarks" / "accuracy"
ITEMS = 40


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch):
    """The scripts as modules; they import each other by bare name."""
    monkeypatch.syspath_prepend(str(FOLDER))
    import choose
    import report
    import run

    yield {"choose": choose, "report": report, "run": run}
    for name in ("choose", "report", "run"):
        sys.modules.pop(name, None)


def made_up(folder: Path, right: dict[str, float], split: str = "test") -> Path:
    """Results in which `label` answers the first `share` of every family's items rightly."""
    rows = []
    for family, answers in (("attribute", "abcd"), ("needle", "abcd"), ("existence", "aaab")):
        for i in range(ITEMS):
            correct = {k: int(i < share * ITEMS) for k, share in right.items()}
            rows.append({"family": family, "answer": answers[i % 4], "correct": correct})
    settings = {}
    for label in right:
        name, _, ratio = label.partition("-")
        settings[label] = {
            "reducer": name,
            "ratio": float(ratio or 0),
            "options": {},
            "achieved_ratio": float(ratio or 0),
            "flops": 100 - 50 * float(ratio or 0),
        }
    manifest = {
        "model": "made-up",
        "split": split,
        "items": len(rows),
        "settings": settings,
        "versions": dict.fromkeys(("torch", "transformers", "tokencomp"), "1"),
        "hardware": {"cpu": "none", "threads": 1},
        "commit": None,
        "date": "2000-01-01",
        "command": "by hand",
    }
    where = folder / "made-up"
    where.mkdir(parents=True)
    (where / f"{split}.json").write_text(json.dumps(manifest))
    (where / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return where


def test_tables(scripts, tmp_path: Path) -> None:
    report = scripts["report"]
    shares = {"full": 0.8, "random-0.9": 0.4, "uniform-0.9": 0.5, "downscale-0.9": 0.9}
    folder = made_up(tmp_path, {**shares, "condiv-0.9": 0.76, "merge-0.9": 0.2})
    results = report.Results.read(folder, "test")
    assert results.learned == ["attribute", "needle"]  # existence: 80 % right, 75 % say "a"
    assert report.kept(results, "condiv-0.9", "images").value == pytest.approx(0.95, abs=0.02)
    rows = report.ratio_table(results, 0.9, "condiv").splitlines()[2:]
    names = [row.split("|")[1].strip() for row in rows]
    assert names == ["random", "uniform", "downscale", "**condiv**", "merge"]
    assert "+" in rows[3].split("|")[5] and "−" in rows[4].split("|")[5]
    told = report.bars(results, "condiv")
    assert sum("below downscale" in line for line in told) == 2
    results.manifest["settings"]["downscale-0.9"]["achieved_ratio"] = 0.3
    told = report.bars(results, "condiv")
    assert [line for line in told if "downscale" in line] == [
        "- ratio 0.9: downscale only gets to 0.30 here, so it is no baseline"
    ]
    assert sum("bar 94%: met" in line or "bar 94%: NOT" in line for line in told) == 2
    text = report.write_report(tmp_path, tmp_path).read_text()
    assert "made-up, ratio 0.9" in text and (tmp_path / "made-up-images.svg").exists()


def test_choice(scripts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The best wins; what lies clearly below is not tied with it."""
    choose = scripts["choose"]
    monkeypatch.setattr(choose, "CANDIDATES", [("condiv", {}), ("merge", {}), ("random", {})])
    monkeypatch.setattr(choose, "HERE", tmp_path)
    shares = {"full": 0.9}
    for ratio in scripts["run"].RATIOS:
        for name, share in (("condiv", 0.875), ("merge", 0.85), ("random", 0.3)):
            shares[Setting(name, ratio).label] = share
    results = [choose.Results.read(made_up(tmp_path, shares, "validation"), "validation")]
    rows = choose.rank(results)
    assert [r["reducer"] for r in rows] == ["condiv", "merge", "random"]
    assert rows[0]["tied"] and not rows[2]["tied"]
    choose.write_choice(rows, results)
    chosen = json.loads((tmp_path / "choice.json").read_text())["chosen"]
    assert chosen["reducer"] == "condiv"
    assert "**condiv**" in (tmp_path / "CHOICE.md").read_text()


def test_auto_is_the_recorded_choice() -> None:
    """`reducer="auto"`, the default of `patch`, is what choose.py wrote down, options included."""
    chosen = json.loads((FOLDER / "choice.json").read_text())["chosen"]
    expected = make_reducer(chosen["reducer"], **chosen["options"])
    family = FAMILIES["qwen2_vl"]
    for options in ({}, {"reducer": "auto"}):
        with tokencomp.patch(family.build(), 0.5, **options) as handle:
            assert [s.reducer for s in handle.plan.stages] == [expected]


def test_tower_runs_once_per_input(scripts) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.visual = nn.Linear(2, 2)

    model, calls = Model(), []
    model.visual.register_forward_hook(lambda *_: calls.append(1))
    plain, run = torch.ones(1, 2), model.visual.forward
    count = []
    monkey = model.visual.forward
    model.visual.forward = lambda x: (count.append(1), monkey(x))[1]
    with scripts["run"].tower_once(model):
        first = model.visual(plain)
        assert torch.equal(first, model.visual(plain)) and len(count) == 1
        model.visual(plain + 1)
        assert len(count) == 2
    assert len(calls) == 3
    assert torch.equal(run(plain), first)
