"""The choice of the default reducer, and what is published of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from accuracy_support import made_up
from tests_support import FAMILIES

import tokencomp
from tokencomp import make_reducer
from tokencomp.evaluation.settings import Setting

FOLDER = Path(__file__).parents[2] / "benchmarks" / "accuracy"
CHOICES = (("condiv", 0.675), ("merge", 0.65), ("random", 0.3))


def choices(folder: Path, names: tuple[str, ...], ratios: Any) -> None:
    """Validation results of several models."""
    shares = {Setting(n, ratio).label: share for ratio in ratios for n, share in CHOICES}
    for name in names:
        made_up(folder, {"full": 0.7, **shares}, "validation", name)


def test_choice(accuracy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The best wins; what lies clearly below is not tied with it; what was not asked waits."""
    choose = accuracy.choose
    candidates = [(name, {}) for name, _ in CHOICES]
    monkeypatch.setattr(choose, "CANDIDATES", [*candidates, ("divprune", {})])
    choices(tmp_path, ("b", "a"), accuracy.run.RATIOS)
    results = choose.read_all(tmp_path, "validation")
    assert [one.manifest["model"] for one in results] == ["a", "b"]
    rows = choose.rank(results, candidates)
    assert [r["reducer"] for r in rows] == ["condiv", "merge", "random"]
    assert [r["score"] for r in rows] == pytest.approx([27 / 28, 26 / 28, 12 / 28])
    assert rows[0]["tied"] and not rows[2]["tied"]
    choose.write_choice(results, tmp_path)
    chosen = json.loads((tmp_path / "choice.json").read_text())["chosen"]
    page = (tmp_path / "CHOICE.md").read_text()
    assert chosen["reducer"] == "condiv" and "**condiv**" in page
    assert "Not asked yet: divprune" in page and page.count("`by hand`") == 2
    missing = [s.label for s in choose.missing(tmp_path / "a", choose.CANDIDATES)]
    assert missing == ["full", *(f"divprune-{r:g}" for r in accuracy.run.RATIOS)]


@pytest.mark.parametrize(
    ("rows", "best"),
    [
        ([("condiv", {"power": 2.0}, 0.99, 0.01), ("merge", {}, 0.98, 0.02)], "merge"),
        ([("condiv", {"power": 2.0}, 0.99, 0.02), ("merge", {}, 0.98, 0.02)], "condiv"),
        ([("merge", {}, 0.99, 0.02), ("condiv", {"power": 1.0, "margin": 0.2}, 0.9, 0.02)], None),
    ],
    ids=["points to spare", "then the score", "but the default before stays"],
)
def test_what_decides_between_tied_candidates(accuracy, rows: Any, best: str | None) -> None:
    keys = ("reducer", "options", "score", "spare")
    found = [dict(zip(keys, row, strict=True)) for row in rows]
    assert max(found, key=accuracy.choose.preference)["reducer"] == (best or "condiv")


def test_points_to_spare_are_those_above_the_bar_of_the_ratio(accuracy, tmp_path: Path) -> None:
    """At 0.95 nothing is kept beyond the bar of 80 %, which is still more to spare than at 0.5."""
    shares = dict(zip(accuracy.run.RATIOS, (0.68, 0.7, 0.7, 0.7), strict=True))
    labels = {Setting("merge", ratio).label: share for ratio, share in shares.items()}
    made_up(tmp_path, {"full": 0.7, **labels}, "validation", "a")
    results = accuracy.choose.read_all(tmp_path, "validation")
    (row,) = accuracy.ranking.rank(results, [("merge", {})])
    kept = [
        accuracy.tables.kept(results[0], "merge-0.5", kind).value for kind in ("images", "videos")
    ]
    assert row["spare"] == pytest.approx(min(0.03, min(kept) - 0.97))


def test_draws_of_a_model_do_not_depend_on_the_others(accuracy, tmp_path: Path) -> None:
    choices(tmp_path, ("a", "b"), accuracy.run.RATIOS)
    results = accuracy.choose.read_all(tmp_path, "validation")
    both, alone = (accuracy.ranking.draws(some) for some in (results, results[1:]))
    assert len(both) == 2 * len(alone)
    assert all((a == b).all() for a, b in zip(both[len(alone) :], alone, strict=True))


def test_the_margin_by_the_same_rule(accuracy, tmp_path: Path, monkeypatch: Any) -> None:
    """Best or tied, then points to spare; what was not asked is asked, once."""
    margin = accuracy.margin
    monkeypatch.setattr(margin, "FAMILIES", ("attribute", "position"))
    right = {0.0: (24, 24, 24, 24), 0.05: (28, 28, 28, 27), 0.1: (28, 28, 27, 28)}
    right[0.2] = (28, 28, 28, 27)
    labels = {
        one.label: count / 40
        for m, counts in right.items()
        for one, count in zip(margin.settings(margin.candidate(m)), counts, strict=True)
    }
    folder = made_up(tmp_path, {"full": 28 / 40, **labels}, "validation")
    results = margin.read(tmp_path)
    assert margin.chosen(results) == 0.2  # as 0.05, and the default before
    assert "| **0.2** | 99.11% |" in margin.page(results)
    more, missing = [*margin.CANDIDATES, margin.candidate(0.3)], accuracy.choose.missing
    assert missing(folder, margin.CANDIDATES) == []
    assert [one.ratio for one in missing(folder, more)] == [0, *accuracy.run.RATIOS]
    known = json.loads((folder / "validation.json").read_text())
    known["settings"]["condiv-0.5-margin=0.1-power=1.0"]["method"] = "an older rule"
    (folder / "validation.json").write_text(json.dumps(known))
    again = missing(folder, margin.CANDIDATES)
    assert [one.label for one in again] == ["full", "condiv-0.5-margin=0.1-power=1.0"]
    monkeypatch.setattr(margin, "CANDIDATES", more)
    assert margin.read(tmp_path) == []


def test_auto_is_the_recorded_choice() -> None:
    """`reducer="auto"`, the default of `patch`, is what choose.py wrote down, options included."""
    chosen = json.loads((FOLDER / "choice.json").read_text())["chosen"]
    expected = make_reducer(chosen["reducer"], **chosen["options"])
    family = FAMILIES["qwen2_vl"]
    for options in ({}, {"reducer": "auto"}):
        with tokencomp.patch(family.build(), 0.5, **options) as handle:
            assert [s.reducer for s in handle.plan.stages] == [expected]


def test_published_pages_are_those_of_the_published_results(scripts, tmp_path: Path) -> None:
    """The pages come out of the result files again, to the letter."""
    copy = shutil.copytree(
        FOLDER / "results", tmp_path / "results", ignore=shutil.ignore_patterns("media", "runs")
    )
    for module in (scripts.results, scripts.report):
        module.RESULTS = copy
    scripts.report.write_report(copy)
    scripts.choose.write_choice(scripts.report.read_all(copy, "validation"), tmp_path)
    margin = scripts.margin
    (tmp_path / "margin.md").write_text(margin.page(margin.read(FOLDER / "margin")))
    for name in ("README.md", "CHOICE.md", "margin.md"):
        assert (tmp_path / name).read_text() == (FOLDER / name).read_text(), name
