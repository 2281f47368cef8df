"""Documents: links lead somewhere, commands exist, the index is complete."""

from __future__ import annotations

import importlib.util
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "benchmarks/**/*.md")
    for path in ROOT.glob(pattern)
    if not {"runs", "media"} & {*path.relative_to(ROOT).parts}
)
NAMES = [str(path.relative_to(ROOT)) for path in PAGES]


def links(page: Path) -> list[str]:
    """Targets of the Markdown links of a page, code blocks left out."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    return re.findall(r"\]\(([^)\s]+)\)", text)


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_lead_to_files(page: Path) -> None:
    local = [link.partition("#")[0] for link in links(page) if "://" not in link]
    assert [link for link in local if link and not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", [*PAGES, ROOT / "Makefile"], ids=[*NAMES, "Makefile"])
def test_commands_exist(page: Path) -> None:
    modules = set(re.findall(r"python -m (benchmarks[\w.]*\w)", page.read_text()))
    assert [name for name in modules if importlib.util.find_spec(name) is None] == []
    scripts = set(re.findall(r"(?<!`)python (benchmarks/[\w/]+\.py)", page.read_text()))
    stored = re.findall(r"`python (benchmarks/[\w/]+\.py)[^`]*`; ", page.read_text())
    assert scripts <= {*stored}  # provenance lines keep the commands of their time


def test_the_index_names_every_page() -> None:
    index = ROOT / "benchmarks" / "README.md"
    linked = {(index.parent / link).resolve() for link in links(index)}
    pages = {path.resolve() for path in PAGES if "benchmarks" in path.relative_to(ROOT).parts}
    assert pages - linked - {index.resolve()} == set()


def test_the_methods_name_every_study_that_is_a_command() -> None:
    folder = ROOT / "benchmarks" / "accuracy"
    named = set(re.findall(r"\w+", (folder / "METHODS.md").read_text()))
    studies = {p.stem for p in folder.glob("studies/*.py") if "__main__" in p.read_text()}
    assert len(studies) > 10 and studies - named == set()


def test_the_evidence_stays_small() -> None:
    """What git tracks under benchmarks/ is below 4 MB, and holds no answer texts by the line."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "benchmarks"]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode or not result.stdout:
        pytest.skip("not a git checkout")
    files = [ROOT / name for name in result.stdout.split("\0") if name]
    assert sum(f.stat().st_size for f in files if f.exists()) < 4e6
    assert not [f for f in files if f.suffix == ".jsonl" and "accuracy" in f.parts]
