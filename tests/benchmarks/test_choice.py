"""The choice of the default reducer, and what is published of it."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support import matrix
from support.accuracy import write_results
from support.families import FAMILIES

import tokencomp
from benchmarks.accuracy import report, store, tables
from benchmarks.accuracy.run import RATIOS
from benchmarks.accuracy.store import read_all
from benchmarks.accuracy.studies import choose, margin, ranking
from tokencomp import make_reducer
from tokencomp.evaluation.settings import Setting

FOLDER = Path(__file__).parents[2] / "benchmarks" / "accuracy"
CHOICES = (("condiv", 0.675), ("bipartite", 0.65), ("random", 0.3))


def choices(folder: Path, names: tuple[str, ...]) -> None:
    """Validation results of several models."""
    shares = {Setting(n, ratio).label: share for ratio in RATIOS for n, share in CHOICES}
    for name in names:
        write_results(folder, {"full": 0.7, **shares}, "validation", name)


def test_choice(unpublished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The best wins; what is clearly below is not tied with it; what has no results is listed."""
    candidates = [(name, {}) for name, _ in CHOICES]
    monkeypatch.setattr(choose, "CANDIDATES", [*candidates, ("divprune", {})])
    choices(unpublished, ("b", "a"))
    results = read_all(unpublished, "validation")
    assert [one.manifest["model"] for one in results] == ["a", "b"]
    rows = choose.rank(results, candidates)
    assert [r["reducer"] for r in rows] == ["condiv", "bipartite", "random"]
    assert [r["score"] for r in rows] == pytest.approx([27 / 28, 26 / 28, 12 / 28])
    assert rows[0]["tied"] and not rows[2]["tied"]
    choose.write_choice(results, unpublished)
    chosen = json.loads((unpublished / "choice.json").read_text())["chosen"]
    page = (unpublished / "choice.md").read_text()
    assert chosen["reducer"] == "condiv" and "**condiv**" in page
    assert "Without results yet: divprune" in page and page.count("`by hand`") == 2
    missing = [s.label for s in choose.missing(unpublished / "a", choose.CANDIDATES)]
    assert missing == ["full", *(f"divprune-{r:g}" for r in RATIOS)]


def test_a_candidate_for_images_and_one_for_videos(unpublished: Path) -> None:
    """Cells of images count the answers of the one, cells of videos those of the other."""
    choices(unpublished, ("a",))
    results = read_all(unpublished, "validation")
    joined = ranking.by_modality(("bipartite", {}), ("random", {}))
    rows = {
        r["reducer"]: r for r in ranking.rank(results, [joined, ("bipartite", {}), ("random", {})])
    }
    for at, (_, _, kind) in enumerate(ranking.keys(results)):
        other = rows["bipartite" if kind == "images" else "random"]
        assert rows[ranking.BY_MODALITY]["cells"][at] == other["cells"][at]
    assert choose.title(joined) == "bipartite on images, random on videos"
    assert {s.reducer for s in ranking.settings(joined)} == {"bipartite", "random"}
    del results[0].settings["random-0.9"]
    assert ranking.answered(results, ("bipartite", {})) and not ranking.answered(results, joined)


@pytest.mark.parametrize(
    ("rows", "best"),
    [
        ([("condiv", {"power": 2.0}, 0.99, 0.01), ("bipartite", {}, 0.98, 0.02)], "bipartite"),
        ([("condiv", {"power": 2.0}, 0.99, 0.02), ("bipartite", {}, 0.98, 0.02)], "condiv"),
        ([("bipartite", {}, 0.99, 0.02), (*choose.PREVIOUS, 0.9, 0.02)], None),
    ],
    ids=["points to spare", "then the score", "but the previous default stays"],
)
def test_what_decides_between_tied_candidates(rows: Any, best: str | None) -> None:
    keys = ("reducer", "options", "score", "spare")
    tied = [dict(zip(keys, row, strict=True)) for row in rows]
    assert max(tied, key=choose.preference)["reducer"] == (best or ranking.BY_MODALITY)


def test_what_the_rule_would_choose_with_merging() -> None:
    """Named where it is tied and has more to spare; otherwise there is nothing to say."""
    default = {"reducer": "kcenter", "options": {}, "score": 0.99, "spare": 0.01, "tied": True}
    merged = {"reducer": "bipartite", "options": {}, "score": 0.98, "spare": 0.02, "tied": True}
    (said,) = choose.by_the_rule([default, merged], ("kcenter", {}))
    assert "**bipartite**" in said and "kcenter" not in said
    for fewer in ({"tied": False}, {"spare": 0.0}):
        assert choose.by_the_rule([default, {**merged, **fewer}], ("kcenter", {})) == []


def test_the_default_asked_again_with_merging(unpublished: Path) -> None:
    """Beside the default stand those that were asked; models that were not take no part."""
    labels = {
        ranking.label(one, ratio, kind): share
        for one, share in ((("condiv", {}), 0.675), *((one, 0.65) for one in choose.AGAINST))
        for ratio in RATIOS
        for kind in store.KINDS
    }
    write_results(unpublished, {"full": 0.7, **labels}, "validation", "a")
    choices(unpublished, ("b",))
    results = read_all(unpublished, "validation")
    models, table, *_ = choose.ranked(results, [("condiv", {}), *choose.AGAINST])
    assert models == "Of a."
    first, second = table.splitlines()[2:4]
    assert first.startswith("| **condiv** | 96.4% |") and "| 92.9% |" in second
    assert table.count("merge=True") > 2
    assert choose.ranked(results[1:], [("condiv", {}), *choose.AGAINST]) == []


def test_points_to_spare_are_those_above_the_bar_of_the_ratio(unpublished: Path) -> None:
    """At 0.95 nothing is kept beyond the bar of 80 %, which is still more to spare than at 0.5."""
    shares = dict(zip(RATIOS, (0.68, 0.7, 0.7, 0.7), strict=True))
    labels = {Setting("bipartite", ratio).label: share for ratio, share in shares.items()}
    write_results(unpublished, {"full": 0.7, **labels}, "validation", "a")
    results = read_all(unpublished, "validation")
    (row,) = ranking.rank(results, [("bipartite", {})])
    kept = [tables.kept(results[0], "bipartite-0.5", kind).value for kind in ("images", "videos")]
    assert row["spare"] == pytest.approx(min(0.03, min(kept) - 0.97))


def test_draws_of_a_model_do_not_depend_on_the_others(unpublished: Path) -> None:
    choices(unpublished, ("a", "b"))
    results = read_all(unpublished, "validation")
    both, alone = (ranking.draws(some) for some in (results, results[1:]))
    assert len(both) == 2 * len(alone)
    assert all((a == b).all() for a, b in zip(both[len(alone) :], alone, strict=True))


def test_the_margin_by_the_same_rule(unpublished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Best or tied, then points to spare; what has no results is run, once."""
    monkeypatch.setattr(margin, "FAMILIES", ("attribute", "position"))
    monkeypatch.setattr(margin, "RESULTS", unpublished / "elsewhere")
    right = {0.0: (24, 24, 24, 24), 0.05: (28, 28, 28, 27), 0.1: (28, 28, 27, 28)}
    right[0.2] = (28, 28, 28, 27)
    labels = {
        one.label: count / 40
        for m, counts in right.items()
        for one, count in zip(margin.settings(margin.candidate(m)), counts, strict=True)
    }
    folder = write_results(unpublished, {"full": 28 / 40, **labels}, "validation")
    results = margin.read(unpublished)
    assert margin.chosen(results) == 0.2  # equal to 0.05, and the previous default
    assert "| **0.2** | 99.11% |" in margin.page(results)
    more, missing = [*margin.CANDIDATES, margin.candidate(0.3)], choose.missing
    assert missing(folder, margin.CANDIDATES) == []
    assert [one.ratio for one in missing(folder, more)] == [0, *RATIOS]
    stored = json.loads((folder / "validation.json").read_text())
    stored["settings"]["condiv-0.5-margin=0.1-power=1.0"]["method"] = "an older rule"
    (folder / "validation.json").write_text(json.dumps(stored))
    again = missing(folder, margin.CANDIDATES)
    assert [one.label for one in again] == ["full", "condiv-0.5-margin=0.1-power=1.0"]
    monkeypatch.setattr(margin, "CANDIDATES", more)
    assert margin.read(unpublished) == []


def test_auto_is_the_recorded_choice() -> None:
    """The default of `patch` keeps what the reducers that choose.py recorded for each kind keep."""
    stored = json.loads((FOLDER / "choice.json").read_text())["chosen"]
    family = FAMILIES["qwen2_vl"]
    for options in ({}, {"reducer": "auto"}):
        with tokencomp.patch(family.build(), 0.5, **options) as handle:
            (stage,) = handle.plan.stages
            assert stage.merge == "auto"  # decided apart, see the last sentences of choice.md
    for kind, grid in (("images", (1, 8, 8)), ("videos", (6, 4, 4))):
        name, chosen = ranking.part((stored["reducer"], stored["options"]), kind, 0.5)
        for seed in range(5):
            tokens = dataclasses.replace(matrix.tokens(grid, seed=seed), modality=kind[:-1])
            kept = [
                one.reduce(tokens, 20).keep for one in (stage.reducer, make_reducer(name, **chosen))
            ]
            assert torch.equal(*kept), (kind, seed)


@pytest.mark.long
def test_published_pages_are_those_of_the_published_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pages are rebuilt from the result files, to the letter."""
    ignored = shutil.ignore_patterns("media", "runs")
    copy = shutil.copytree(FOLDER / "results", tmp_path / "results", ignore=ignored)
    for module in (store, report):
        monkeypatch.setattr(module, "RESULTS", copy)
    monkeypatch.setattr(report, "ACCURACY", tmp_path)
    report.write_report(copy)
    choose.write_choice(choose.evidence(copy), tmp_path)
    (tmp_path / "margin.md").write_text(margin.page(margin.read(FOLDER / "margin")))
    for name in ("README.md", "summary.md", "choice.md", "margin.md"):
        assert (tmp_path / name).read_text() == (FOLDER / name).read_text(), name


def test_two_candidates_over_groups_of_models(unpublished: Path) -> None:
    """Each group by the names that its answers have; the cells of all groups count alike."""
    choices(unpublished, ("a", "b", "c"))
    a, b, c = read_all(unpublished, "validation")
    found = ranking.compare(
        [([a, b], ("bipartite", {}), ("condiv", {})), ([c], ("random", {}), ("bipartite", {}))]
    )
    assert found["cells"] == 3 * len(RATIOS) * len(store.KINDS)
    first, second = (2 * 26 + 12) / (3 * 28), (2 * 27 + 26) / (3 * 28)
    assert found["scores"] == pytest.approx([first, second])
    highest = max(store.BARS.values())
    assert found["spare"] == pytest.approx([12 / 28 - highest, 26 / 28 - highest])
    low, high = found["difference"]
    assert low < second - first < high
