"""The choice of the default reducer, and what is published of it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support import matrix
from support.accuracy import write_results
from support.families import FAMILIES

import tokencomp
from benchmarks.accuracy.run import RATIOS
from benchmarks.accuracy.store import read_all
from benchmarks.accuracy.studies import choose, ranking
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
    assert "Without results yet: divprune" in page and "- a: 120 questions" in page
    missing = [s.label for s in choose.missing(unpublished / "a", choose.CANDIDATES)]
    assert missing == ["full", *(f"divprune-{r:g}" for r in RATIOS)]


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


def test_auto_is_the_recorded_choice() -> None:
    """The default of `patch` keeps what the reducers that choose.py recorded for each kind keep."""
    stored = json.loads((FOLDER / "choice.json").read_text())["chosen"]
    family = FAMILIES["qwen2_vl"]
    for options in ({}, {"reducer": "auto"}):
        with tokencomp.patch(family.build(), 0.5, **options) as handle:
            (stage,) = handle.plan.stages
            assert stage.merge == "auto"  # decided apart, see the last table of choice.md
    for kind, grid in (("images", (1, 8, 8)), ("videos", (6, 4, 4))):
        name, chosen = ranking.part((stored["reducer"], stored["options"]), kind, 0.5)
        for seed in range(5):
            tokens = dataclasses.replace(matrix.tokens(grid, seed=seed), modalities=[kind[:-1]])
            pair = stage.reducer, make_reducer(name, **chosen)
            kept = [matrix.kept(one, tokens, 20).rows for one in pair]
            assert torch.equal(*kept), (kind, seed)
