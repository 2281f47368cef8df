"""Published pages follow from stored results, of committed code; links and commands exist."""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.accuracy import report, store, tables
from benchmarks.accuracy.studies import (
    adsc,
    baselines,
    ccam,
    choose,
    long_video,
    margin,
    newer,
    order,
    pixels,
    retrieval,
    selector,
    selector_features,
    session,
    tower_book,
)
from benchmarks.accuracy.studies import tower as study_tower
from benchmarks.files import accuracy_page, clock, stream
from benchmarks.gpu import recompute
from benchmarks.gpu.contribution import read
from benchmarks.kernels import calls
from benchmarks.models import chunked_prefill, prefill, tower, tower_page
from benchmarks.mutants import page as mutants
from benchmarks.mutants.run import read as read_mutants
from benchmarks.nlvr import page as nlvr
from benchmarks.peers import run as peers
from benchmarks.publishing import LOST, MARK, csv_text, made_at, published_from, read_lines, version
from benchmarks.publishing import read as read_json
from benchmarks.real import candidates, clip_answers, clips
from benchmarks.real import page as photographs
from benchmarks.screens import answers_page, counts_page, receipts_page
from benchmarks.serving import agents
from benchmarks.sounds import page as sounds
from tokencomp.errors import OptionError
from tokencomp.evaluation.environment import git

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
ACCURACY = BENCHMARKS / "accuracy"
Files = dict[str, str]
"""Text by path below benchmarks/."""


def pages(module: Any, name: str, rows: Callable[[Any], Any] | None = None) -> Files:
    """The page of a stored JSON file, and with `rows` its CSV file."""
    stored, files = read_json(BENCHMARKS / f"{name}.json"), {}
    files[f"{name}.md"] = module.page(stored)
    if rows:
        files[f"{name}.csv"] = csv_text(rows(stored))
    return files


def photographs_page(name: str, page: str, head: str = photographs.HEAD) -> Files:
    stored, data = read_json(BENCHMARKS / f"real/{name}.json"), f"{name}.csv"
    text = photographs.page(stored, head, data)
    return {f"real/{page}.md": text, f"real/{data}": csv_text(photographs.records(stored))}


def study_page(module: Any, name: str) -> Files:
    text, data = module.page()
    return {f"accuracy/{name}.md": text, f"accuracy/{name}.csv": data}


def prefills() -> Files:
    records = read_lines(BENCHMARKS / "models/prefill.jsonl")
    data = csv_text(prefill.rows_of(records))
    return {"models/prefill.md": prefill.page(records), "models/prefill.csv": data}


def towers() -> Files:
    records = tower.in_order(read_lines(BENCHMARKS / "models/tower.jsonl"))
    data = csv_text(tower_page.rows_of(records))
    return {"models/tower.md": tower_page.page(records), "models/tower.csv": data}


def compared() -> Files:
    rows = baselines.compared(baselines.read())
    return {"accuracy/baselines.md": baselines.page(rows), "accuracy/baselines.csv": csv_text(rows)}


def margins() -> Files:
    results = margin.read(ACCURACY / "margin")
    text, data = margin.page(results), margin.data(results)
    return {"accuracy/margin.md": text, "accuracy/margin.csv": data}


def heard() -> Files:
    stored = read_json(BENCHMARKS / "sounds/results.json")
    splits = ("validation", "test")
    data = {f"sounds/{k}.csv": csv_text(photographs.records(stored[k])) for k in splits}
    return {"sounds/README.md": sounds.page(stored), **data}


def swept(name: str) -> Files:
    folder = ACCURACY / name
    every = store.read_all(folder)
    files = {
        f"accuracy/{name}/{one.manifest['model']}.csv": csv_text(
            [tables.record(one, label) for label in one.settings]
        )
        for one in every
    }
    if name != report.NO_PAGE:
        files[f"accuracy/{name}/README.md"] = report.text(folder, every)
    return files


def recorded_screens() -> Files:
    return {"screens/README.md": counts_page.page(read_json(BENCHMARKS / "screens/counts.json"))}


def machine_code() -> Files:
    content = json.loads((BENCHMARKS / "kernels/calls.json").read_text())
    rows = [calls.Row(**row) for row in content["rows"]]
    text = calls.markdown(rows, content["decode"])
    return {"kernels/calls.md": f"{text}\n{made_at(content)}"}


def plain_pages() -> Files:
    """Pages of one JSON file without tables."""
    found = json.loads(mutants.RESULTS.read_text())
    return {
        "mutants/README.md": mutants.page(read_mutants(), found),
        "nlvr/README.md": nlvr.page(json.loads(nlvr.RESULTS.read_text())),
    }


QUICK: dict[str, Callable[[], Files]] = {
    "mutants and NLVR": plain_pages,
    "newer": lambda: study_page(newer, "newer"),
    "order": lambda: study_page(order, "order"),
    "pixels": lambda: pages(pixels, "accuracy/pixels"),
    "session": lambda: pages(session, "accuracy/session"),
    "retrieval": lambda: pages(retrieval, "accuracy/retrieval"),
    "accuracy of frames": lambda: pages(accuracy_page, "files/accuracy", accuracy_page.records),
    "clock": lambda: pages(clock, "files/clock"),
    "stream": lambda: pages(stream, "files/stream", lambda stored: stored["rows"]),
    "calls": machine_code,
    "chunked prefill": lambda: pages(chunked_prefill, "models/chunked_prefill"),
    "prefill": prefills,
    "tower": towers,
    "peers": lambda: pages(peers, "peers/peers"),
    "agents": lambda: pages(agents, "serving/agents"),
    "screens": recorded_screens,
    "receipts": lambda: pages(receipts_page, "screens/receipts", lambda stored: stored["rows"]),
    "answers about screens": lambda: pages(
        answers_page, "screens/answers", lambda stored: stored["rows"]
    ),
}
LONG: dict[str, Callable[[], Files]] = {
    "baselines": compared,
    "margin": margins,
    "photographs": lambda: photographs_page("results", "README"),
    "merging": lambda: pages(candidates, "real/merging"),
    "clip answers": lambda: photographs_page("clip_answers", "clip_answers", clip_answers.HEAD),
    "clips": lambda: pages(clips, "real/clips"),
    "sounds": heard,
    **{
        name: lambda name=name: swept(name)
        for name in ("unseen", "counting", "chance", "hard", "long")
    },
}


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(n, marks=pytest.mark.long) for n in LONG)])
def test_pages_and_data_are_those_of_the_results(name: str) -> None:
    for file, text in {**QUICK, **LONG}[name]().items():
        assert (BENCHMARKS / file).read_text().rstrip() == text.rstrip(), file


@pytest.mark.long
def test_pages_of_all_models_are_those_of_their_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ignored = shutil.ignore_patterns("media", "runs")
    copy = shutil.copytree(ACCURACY / "results", tmp_path / "results", ignore=ignored)
    for module in (store, report):
        monkeypatch.setattr(module, "RESULTS", copy)
    monkeypatch.setattr(report, "ACCURACY", tmp_path)
    for file in copy.glob("*.csv"):
        file.unlink()
    report.write_report(copy)
    choose.write_choice(choose.evidence(copy), tmp_path)
    shutil.copy(ACCURACY / tower_book.DISTANCE, tmp_path)
    study_tower.write_page(study_tower.ordered(ACCURACY / "tower.json"), tmp_path)
    ends = ("README.md", "choice.md", "choice.csv", "tower.md", "tower.csv")
    names = (*ends, "tower_distance.csv")
    for name in (*names, *(f"results/{file.name}" for file in copy.glob("*.csv"))):
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
    (tmp_path / f"{name}.json").write_text((ACCURACY / f"{name}.json").read_text())
    study = STUDIES[name]
    args = argparse.Namespace(
        output=tmp_path, sets=[], every=list(study.SETS), split="test", report=True,
        model=name.removeprefix("long_video-"), allow_dirty=True, weights=None, control=None,
        threads=1,
    )  # fmt: skip
    study.main(args)
    for file in (f"{name}.md", f"{name}.csv"):
        assert (tmp_path / file).read_text() == (ACCURACY / file).read_text(), file


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


PAGES = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "benchmarks/**/*.md")
    for path in ROOT.glob(pattern)
    if not {"runs", "media"} & {*path.relative_to(ROOT).parts}
)


def links(page: Path) -> list[str]:
    """Targets of the Markdown links of a page, code blocks left out."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    return re.findall(r"\]\(([^)\s]+)\)", text)


def test_links_lead_to_files() -> None:
    for page in PAGES:
        local = [link.partition("#")[0] for link in links(page) if "://" not in link]
        assert [x for x in local if x and not (page.parent / x).exists()] == [], page


def test_commands_exist() -> None:
    for page in (*PAGES, ROOT / "Makefile"):
        text = page.read_text()
        modules = set(re.findall(r"python -m (benchmarks[\w.]*\w)", text))
        assert [name for name in modules if importlib.util.find_spec(name) is None] == [], page
        scripts = set(re.findall(r"(?<!`)python (benchmarks/[\w/]+\.py)", text))
        stored = re.findall(r"`python (benchmarks/[\w/]+\.py)[^`]*`; ", text)
        assert scripts <= {*stored}, page  # provenance lines keep the commands of their time


def test_the_index_names_every_page() -> None:
    index = ROOT / "benchmarks" / "README.md"
    linked = {(index.parent / link).resolve() for link in links(index)}
    pages = {path.resolve() for path in PAGES if "benchmarks" in path.relative_to(ROOT).parts}
    assert pages - linked - {index.resolve()} == set()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A repository with one commit of code and results."""
    root = tmp_path / "checkout"
    (root / "benchmarks").mkdir(parents=True)
    (root / "code.py").write_text("x = 1\n")
    (root / "benchmarks" / "results.json").write_text("{}\n")
    identity = ("-c", "user.name=n", "-c", "user.email=e@e")
    for arguments in (("init", "-q"), ("add", "-A"), (*identity, "commit", "-qm", "first")):
        subprocess.run(["git", "-C", str(root), *arguments], check=True)
    return root


def test_changed_code_is_refused_or_marked(checkout: Path) -> None:
    (checkout / "code.py").write_text("x = 2\n")
    with pytest.raises(OptionError, match=r"code\.py.*--allow-dirty"):
        published_from(checkout / "benchmarks" / "accuracy", False, checkout)
    facts = published_from(checkout / "benchmarks", True, checkout)
    assert facts[MARK] is False and facts["commit"].endswith("+dirty")
    facts = published_from(checkout.parent / "trial", False, checkout)  # is never published
    assert facts[MARK] is False


def test_nothing_that_is_marked_is_in_the_repository() -> None:
    files = [*BENCHMARKS.rglob("*.json"), *BENCHMARKS.rglob("*.jsonl")]
    texts = [f.read_text() for f in files if not {"runs", "media"} & {*f.parts}]
    marked = re.compile(rf'"{MARK}":\s?false')
    assert marked.search(f'"{MARK}":false') and marked.search(json.dumps({MARK: False}))
    assert texts and not [t for t in texts if marked.search(t)]


def test_commits_that_the_repository_has_not_are_marked() -> None:
    """Every commit of a stored result is in the history, or listed as lost."""
    root = BENCHMARKS.parent
    if not (root / ".git").exists() or git(root, "rev-parse", "--is-shallow-repository") == "true":
        pytest.skip("no history")
    history = {*git(root, "rev-list", "HEAD").split()}
    files = [*BENCHMARKS.rglob("*.json"), *BENCHMARKS.rglob("*.jsonl")]
    texts = [f.read_text() for f in files if not {"runs", "media"} & {*f.parts}]
    named = {c for text in texts for c in re.findall(r'"commit":\s?"([0-9a-f]{40})', text)}
    assert len(named) > 20 and {c[:8] for c in named - history} == LOST
    assert version(f"{'1' * 40}+dirty") == "commit 111111111111 (**uncommitted code**)"
    assert "not in the repository" in version(f"{min(LOST)}{'0' * 32}")
