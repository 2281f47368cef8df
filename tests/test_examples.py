"""Every example runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

# serve_*.py need a running server: tests/serving runs them
FOLDER = Path(__file__).parents[1] / "examples"
EXAMPLES = sorted(p for p in FOLDER.glob("*.py") if not p.stem.startswith("serve_"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_example(path: Path) -> None:
    if path.stem == "train_adsc":
        pytest.importorskip("peft")
    done = subprocess.run([sys.executable, path], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip()
