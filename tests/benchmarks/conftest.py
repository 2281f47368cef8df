"""Tests of the benchmarks see no published results unless they name them."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.embedded import examples, folder, loaded

from benchmarks.accuracy import report, store

__all__ = ["examples", "folder", "loaded", "unpublished"]


@pytest.fixture
def unpublished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for results, with no published results beside them."""
    for module in (store, report):
        monkeypatch.setattr(module, "RESULTS", tmp_path / "elsewhere")
    return tmp_path
