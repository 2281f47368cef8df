"""The scripts of the accuracy benchmark as modules; they import each other by bare name."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from accuracy_support import BLIND

FOLDER = Path(__file__).parents[2] / "benchmarks" / "accuracy"


class Scripts:
    def __getattr__(self, name: str) -> ModuleType:
        return importlib.import_module(name)


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(FOLDER))
    yield Scripts()
    for name in [path.stem for path in FOLDER.glob("*.py")]:
        sys.modules.pop(name, None)


@pytest.fixture
def accuracy(scripts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The scripts, with one model whose blind guesses are known."""
    monkeypatch.setattr(scripts.results, "metrics", lambda name: {"blind": BLIND})
    monkeypatch.setattr(scripts.results, "RESULTS", tmp_path / "elsewhere")
    return scripts
