"""Published numbers need committed code."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

from benchmarks.publishing import LOST, MARK, published_from, version
from tokencomp.errors import OptionError
from tokencomp.evaluation.environment import git

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


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


def test_committed_code_may_publish(checkout: Path) -> None:
    """Also where results have changed: a run that was stopped goes on."""
    (checkout / "benchmarks" / "results.json").write_text("[]\n")
    facts = published_from(checkout / "benchmarks", False, checkout)
    head = subprocess.run(
        ["git", "-C", str(checkout), "rev-parse", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    assert facts == {"commit": head}


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
