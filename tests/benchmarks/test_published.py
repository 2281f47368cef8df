"""Published pages follow from stored results, of committed code; links and commands exist."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
from pathlib import Path

import pytest

from benchmarks import pages
from benchmarks.experiment import Experiment
from benchmarks.publishing import LOST, MARK, published_from, version
from tokencomp.errors import OptionError
from tokencomp.evaluation.environment import git

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
SLOW = (
    "accuracy/baselines", "accuracy/chance", "accuracy/choice", "accuracy/counting",
    "accuracy/hard", "accuracy/long", "accuracy/results", "accuracy/tower", "accuracy/unseen",
    "real/clip_answers", "real/results",
)  # fmt: skip


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.long) if n in SLOW else n for n in pages.PAGES]
)
def test_pages_are_those_of_the_results(name: str) -> None:
    files = pages.PAGES[name]()
    assert files
    for path, text in files.items():
        if path.suffix == ".csv":  # not stored
            assert len(text.splitlines()) > 1, path
        else:
            assert path.read_text() == text, path


PAGES = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "benchmarks/**/*.md")
    for path in ROOT.glob(pattern)
    if not {"runs", "media"} & {*path.relative_to(ROOT).parts}
)


def has_history() -> bool:
    shallow = (ROOT / ".git").exists() and git(ROOT, "rev-parse", "--is-shallow-repository")
    return shallow == "false"


def links(page: Path) -> list[str]:
    """Targets of the Markdown links of a page, code blocks left out."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    return re.findall(r"\]\(([^)\s]+)\)", text)


def test_links_lead_to_files() -> None:
    for page in PAGES:
        local = [link.partition("#")[0] for link in links(page) if "://" not in link]
        assert [x for x in local if x and not (page.parent / x).exists()] == [], page


COMMAND = r"`python (?:-m )?(benchmarks[\w./]*\w)[^`]*`"


def test_commands_exist() -> None:
    """In this checkout, or at the commit that is named with them."""
    for page in (*PAGES, ROOT / "Makefile"):
        text = re.sub(f"{COMMAND}(; | at commit [0-9a-f]{{8}})", "", page.read_text())
        modules = set(re.findall(r"python -m (benchmarks[\w.]*\w)", text))
        assert [name for name in modules if importlib.util.find_spec(name) is None] == [], page
        assert not re.findall(r"(?<!`)python benchmarks/[\w/]+\.py", text), page


def test_commands_of_records_exist_at_their_commit() -> None:
    if not has_history():
        pytest.skip("no history")
    found = set()
    for page in PAGES:
        found |= {*re.findall(f"{COMMAND} at commit ([0-9a-f]{{8}})", page.read_text())}
    assert len(found) > 10
    for module, commit in found:
        path = module.replace(".", "/")
        files = git(ROOT, "ls-tree", "--name-only", commit, f"{path}.py", f"{path}/__main__.py")
        assert files, (module, commit)


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
    if not has_history():
        pytest.skip("no history")
    history = {*git(ROOT, "rev-list", "HEAD").split()}
    files = [*BENCHMARKS.rglob("*.json"), *BENCHMARKS.rglob("*.jsonl")]
    texts = [f.read_text() for f in files if not {"runs", "media"} & {*f.parts}]
    named = {c for text in texts for c in re.findall(r'"commit":\s?"([0-9a-f]{40})', text)}
    assert len(named) > 20 and {c[:8] for c in named - history} == LOST
    assert version(f"{'1' * 40}+dirty") == "commit 111111111111 (**uncommitted code**)"
    assert "not in the repository" in version(f"{min(LOST)}{'0' * 32}")


@pytest.mark.parametrize("one", pages.EXPERIMENTS, ids=lambda one: one.name)
def test_every_command_line_has_its_defaults(one: Experiment) -> None:
    args = one.parser(None).parse_args([])
    assert args.out == one.file and {name.lower() for name in one.options} <= {*vars(args)}
    assert one.parser("x").format_help()
    assert importlib.util.find_spec(one.module) is not None


@pytest.mark.parametrize("lines", [False, True])
def test_results_keep_where_they_come_from(tmp_path: Path, lines: bool) -> None:
    """Of records that another run has measured, its provenance stays."""
    one = Experiment("x", lambda args: (), lambda stored: f"{len(stored)} parts", lines=lines)
    facts = {"commit": "1" * 40, "date": "2026-12-02", "command": "new"}
    old = {"commit": "2" * 40, "date": "2026-12-01", "command": "old"}
    content = [{"a": 1}, {"a": 2, "environment": old}] if lines else {"a": 1}
    path = tmp_path / f"x.{'jsonl' if lines else 'json'}"
    one.store(path, content, facts)
    (page,) = one.files(path).values()
    assert page.startswith("2 parts") and "`new`" in page and "commit 1111" in page
    assert ("`old`" in page and "2026-12-01" in page) == lines
