"""Every example runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

# serve_*.py need a running server: tests/serving runs them
FOLDER = Path(__file__).parents[1] / "examples"
EXAMPLES = sorted(p for p in FOLDER.glob("*.py") if not p.stem.startswith("serve_"))


def example(path: Path) -> object:
    """A training takes minutes on a busy machine, so plain pytest leaves it out."""
    marks = [pytest.mark.long] if path.stem.startswith("train_") else []
    return pytest.param(path, id=path.stem, marks=marks)


@pytest.mark.parametrize("path", map(example, EXAMPLES))
def test_example(path: Path) -> None:
    if path.stem == "train_adsc":
        pytest.importorskip("peft")
    done = subprocess.run([sys.executable, path], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip()
