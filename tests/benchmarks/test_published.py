"""Published pages are what the stored results give, to the letter."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.accuracy import report, store
from benchmarks.accuracy.studies import (
    adsc,
    baselines,
    ccam,
    choose,
    long_video,
    margin,
    newer,
    retrieval,
    selector,
    selector_features,
    session,
)
from benchmarks.files import accuracy_page, clock, stream
from benchmarks.gpu import page as gpu_page
from benchmarks.gpu import recompute
from benchmarks.gpu.contribution import read
from benchmarks.models import chunked_prefill, prefill
from benchmarks.peers import run as peers
from benchmarks.publishing import read_lines
from benchmarks.real import candidates, clip_answers, clips
from benchmarks.real import page as photographs
from benchmarks.serving import agents
from benchmarks.sounds import page as sounds
from benchmarks.stored import read_stored

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
ACCURACY = BENCHMARKS / "accuracy"


def of_file(page: Callable[[Any], str], name: str) -> Callable[[], str]:
    """The page of a stored JSON file."""
    return lambda: page(read_stored(BENCHMARKS / name))


QUICK: dict[str, Callable[[], str]] = {
    "accuracy/newer.md": newer.page,
    "accuracy/session.md": of_file(session.page, "accuracy/session.json"),
    "accuracy/retrieval.md": of_file(retrieval.page, "accuracy/retrieval.json"),
    "files/accuracy.md": of_file(accuracy_page.page, "files/accuracy.json"),
    "files/clock.md": of_file(clock.page, "files/clock.json"),
    "files/stream.md": of_file(stream.page, "files/stream.json"),
    "gpu/prefill.md": lambda: gpu_page.page(
        [r for path in sorted((BENCHMARKS / "gpu").glob("*.jsonl")) for r in read_lines(path)]
    ),
    "models/chunked_prefill.md": of_file(chunked_prefill.page, "models/chunked_prefill.json"),
    "models/prefill.md": lambda: prefill.page(read_lines(BENCHMARKS / "models/prefill.jsonl")),
    "peers/peers.md": of_file(peers.page, "peers/peers.json"),
    "serving/agents.md": of_file(agents.page, "serving/agents.json"),
}
LONG: dict[str, Callable[[], str]] = {
    "accuracy/baselines.md": lambda: baselines.page(baselines.read()),
    "real/README.md": of_file(photographs.page, "real/results.json"),
    "real/candidates.md": lambda: candidates.page(
        read_stored(candidates.FORMER), candidates.FORMER
    ),
    "real/merging.md": of_file(candidates.page, "real/merging.json"),
    "real/clip_answers.md": lambda: photographs.page(
        read_stored(clip_answers.RESULTS), clip_answers.HEAD
    ),
    "real/clips.md": of_file(clips.page, "real/clips.json"),
    "sounds/README.md": of_file(sounds.page, "sounds/results.json"),
    **{
        f"accuracy/{name}/README.md": lambda name=name: report.text(ACCURACY / name)
        for name in ("unseen", "counting", "chance", "hard", "long")
    },
}


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(n, marks=pytest.mark.long) for n in LONG)])
def test_a_page_is_that_of_its_results(name: str) -> None:
    assert (BENCHMARKS / name).read_text().rstrip() == {**QUICK, **LONG}[name]().rstrip()


@pytest.mark.long
def test_pages_of_all_models_are_those_of_their_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ignored = shutil.ignore_patterns("media", "runs")
    copy = shutil.copytree(ACCURACY / "results", tmp_path / "results", ignore=ignored)
    for module in (store, report):
        monkeypatch.setattr(module, "RESULTS", copy)
    monkeypatch.setattr(report, "ACCURACY", tmp_path)
    report.write_report(copy)
    choose.write_choice(choose.evidence(copy), tmp_path)
    (tmp_path / "margin.md").write_text(margin.page(margin.read(ACCURACY / "margin")))
    for name in ("README.md", "summary.md", "choice.md", "margin.md"):
        assert (tmp_path / name).read_text() == (ACCURACY / name).read_text(), name


STUDIES = {
    "adsc": adsc,
    "ccam": ccam,
    "selector": selector,
    "selector_features": selector_features,
    "long_video-tiny-qwen2-vl": long_video,
    "long_video-tiny-llava-onevision": long_video,
}


@pytest.mark.parametrize(
    "name", [n if n == "adsc" else pytest.param(n, marks=pytest.mark.long) for n in STUDIES]
)
def test_pages_of_trained_methods_are_those_of_their_results(tmp_path: Path, name: str) -> None:
    for file in (f"{name}.json", f"{name}.md"):
        (tmp_path / file).write_text((ACCURACY / file).read_text())
    study = STUDIES[name]
    args = argparse.Namespace(
        output=tmp_path, sets=[], every=list(study.SETS), split="test", report=True,
        model=name.removeprefix("long_video-"), allow_dirty=True, weights=None, control=None,
        threads=1,
    )  # fmt: skip
    study.main(args)
    assert (tmp_path / f"{name}.md").read_text() == (ACCURACY / f"{name}.md").read_text()


def test_tables_of_readers_are_what_the_sent_files_give() -> None:
    assert recompute.main(["--check"]) == 0
    for path in recompute.ROOT.glob("*/*.json"):
        assert read(path).table == path.parent.name


def test_counts_of_agents_are_those_of_the_rules() -> None:
    stored = json.loads(agents.OUT.read_text())
    rows = {row["policy"]: row for row in stored["rows"]}
    assert {*rows} == {*agents.POLICIES}
    for name, policy in agents.POLICIES.items():
        assert agents.count(policy).items() <= rows[name].items()
    assert agents.table(stored) in (ROOT / "docs/agents.md").read_text()
