"""The benchmark on real weights: a toy run without any package, and its pages."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
from support.photographs import Drawings, toy

from benchmarks.gpu.recompute import losing
from benchmarks.real import candidates, clip_answers, page, run
from benchmarks.stored import read_stored
from recipes.photographs.items import items
from recipes.photographs.model import build_processor
from tokencomp.evaluation.runs import EvalRun
from tokencomp.storage import write_json


@pytest.mark.parametrize("margin", (-1.0, 2.0))
def test_toy_run_makes_a_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, margin: float
) -> None:
    """Where no family is learned, the page says so instead of comparing methods."""
    monkeypatch.setattr(run, "MARGIN", margin)
    model, tokenizer = toy()
    args = argparse.Namespace(
        per_family=2, batch=18, frames=1,
        methods=("uniform", "downscale", "auto", "scope"), ratios=(0.75,),
    )  # fmt: skip
    pairs = {split: run.item_examples(Drawings(), split, 2) for split in ("validation", "test")}
    results = run.answer(model.eval(), build_processor(tokenizer), pairs, args, tmp_path)
    facts = {
        "command": "x", "date": "2026-01-01", "commit": "0" * 40, "versions": {},
        "hardware": {"cpu": "x", "threads": 1}, "finished": True, "stages": {"names": 1},
        "share": 1.0, "seconds": 1, "training_scores": {}, "trained_parameters": 1,
    }  # fmt: skip
    path = write_json(tmp_path / "r.json", {"about": facts, "training": facts, **results})
    text = page.write_page(path, tmp_path / "r.md").read_text()
    assert ("No family is learned" in text) is (margin > 1)
    if margin > 1:
        return
    by_label = {row["label"]: row for row in results["rows"]}
    assert by_label["auto at 0.75"]["reached"] == pytest.approx(0.75, abs=0.01)
    assert by_label["downscale at 0.75"]["visual_tokens"] == 49  # of 196
    assert len(by_label) == 1 + 3 + 5
    assert {"auto merge=False at 0.75", "scope merge=True saliency=none at 0.75"} < set(by_label)
    assert "| auto | 0.75 |" in text and "random (3 seeds)" in text and "random seed" not in text
    for one in run.draw(model, build_processor(tokenizer), Drawings(), args, tmp_path):
        (picture,) = (tmp_path / "lost").rglob(one.picture)
        assert picture.stat().st_size and one.full == one.answer != one.compressed


def test_clips_are_asked_with_every_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Frames are pictures of one prompt; what a method keeps is its share of all of them."""
    monkeypatch.setattr(run, "MARGIN", -1.0)
    monkeypatch.setattr(clip_answers, "SIZE", 128)
    model, tokenizer = toy()
    args = argparse.Namespace(
        per_family=1, batch=2, frames=4, methods=("fewer_frames", "auto"), ratios=(0.5,)
    )
    pairs = clip_answers.clip_pairs(Drawings(), 1, tmp_path)
    results = run.answer(model.eval(), build_processor(tokenizer), pairs, args, tmp_path / "runs")
    rows = {row["label"]: row for row in results["rows"]}
    full = rows["full"]["visual_tokens"]
    assert full % 4 == 0 and all(row["frames"] == 4 for row in rows.values())
    for label in ("fewer_frames at 0.5", "auto at 0.5", "random seed=1 at 0.5"):
        assert rows[label]["visual_tokens"] == full / 2, label
    assert results["learned"] == ["existence", "appears"] == [*results["blind"]["test"]]


def test_candidates_stand_on_a_page_with_their_difference_to_random(tmp_path: Path) -> None:
    """The numbers of the page are counted again from the answers on disk."""
    model, tokenizer = toy()
    asked = [*items(Drawings(), "validation", 2, ("half", "count"))]
    processor = build_processor(tokenizer)
    results = candidates.answer(model.eval(), processor, asked, 4, tmp_path)
    about = {
        "command": "x", "date": "2026-01-01", "commit": "0" * 40, "versions": {},
        "hardware": {"cpu": "x", "threads": 1},
    }  # fmt: skip
    text = candidates.page({"about": about, **results})
    rows = {r.split(" | ")[0].strip("| "): r for r in text.splitlines() if r.startswith("| ")}
    lines = (tmp_path / "kcenter-0.75" / "records.jsonl").read_text().splitlines()
    share = sum(json.loads(line)["correct"] for line in lines) / len(asked)
    assert rows["kcenter"].split(" | ")[2].startswith(f"{share:.1%}, ")
    names = {f"{name} {', '.join(f'{k}={v}' for k, v in options.items())}".strip()
             for name, options in [("random", {}), *candidates.CANDIDATES]}  # fmt: skip
    assert names < {*rows} and "4 questions" in text
    (tmp_path / "stored.json").write_text(json.dumps({"about": about, **results}))
    stored = candidates.photographs(tmp_path / "stored.json")
    assert stored.select("videos") == [] and stored.learned == ("half", "count")
    assert sum(stored.scores("kcenter-0.75", "images")) == round(share * len(asked))
    assert len(stored.scores("full", "images", ["half"])) == 2


@pytest.mark.long
def test_published_pages_are_those_of_their_results() -> None:
    for path in (candidates.FORMER, candidates.RESULTS):
        text = candidates.page(read_stored(path), path)
        assert path.with_suffix(".md").read_text().rstrip() == text.rstrip(), path
    for path, own, head in (
        (page.RESULTS, page.PAGE, page.HEAD),
        (clip_answers.RESULTS, clip_answers.RESULTS.with_suffix(".md"), clip_answers.HEAD),
    ):
        text = page.page(read_stored(path), head)
        assert own.read_text().rstrip() == text.rstrip(), path


def test_losing_cases_are_named() -> None:
    """A method that a baseline beats stands below the table, with its ratio."""
    bits = {"full": [1, 1, 1, 1], "random": [1, 1, 1, 0], "condiv": [1, 0, 0, 0]}
    runs = [
        EvalRun(
            None,
            [{"id": k, "family": "name", "correct": bit} for k, bit in enumerate(own)],
            {"identity": {"reducer": name, "ratio": 0.75 * (name != "full"), "options": {}}},
        )
        for name, own in bits.items()
    ]
    assert "- condiv at 0.75, name: 25%, random 75% (p 0.5)" in losing(runs)
