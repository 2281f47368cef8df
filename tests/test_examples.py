"""Every example runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

# serve_*.py need a running server (tests/serving runs them), embed.py needs sentence-transformers
# (tests/embedding)
FOLDER = Path(__file__).parents[1] / "examples"
EXAMPLES = sorted(p for p in FOLDER.glob("*.py") if not p.stem.startswith(("serve_", "embed")))


# Runs the scripts that its arguments name, and prints a line before each.
DRIVER = """
import runpy, sys
for path in sys.argv[1:]:
    print("==", path, flush=True)
    sys.argv = [path]
    runpy.run_path(path, run_name="__main__")
"""


def run(*paths: Path) -> list[str]:
    """What each script prints. They share a process: starting one takes most of the time."""
    command = [sys.executable, "-c", DRIVER, *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{done.stdout[-500:]}\n{done.stderr[-2000:]}"
    return [part.partition("\n")[2] for part in done.stdout.split("== ")[1:]]


def test_examples() -> None:
    paths = [path for path in EXAMPLES if not path.stem.startswith("train_")]
    printed = run(*paths)
    assert len(printed) == len(paths) == 5 and all(text.strip() for text in printed)
    stream = dict(zip([path.stem for path in paths], printed, strict=True))["stream"]
    assert "300 rows (budget 300)" in stream


@pytest.mark.long
@pytest.mark.parametrize(
    "path", [p for p in EXAMPLES if p.stem.startswith("train_")], ids=lambda path: path.stem
)
def test_training_example(path: Path) -> None:
    if path.stem == "train_adsc":
        pytest.importorskip("peft")
    assert run(path)[0].strip()
