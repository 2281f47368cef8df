"""The first hour on a GPU: every part runs on a CPU, and finished parts are not repeated."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import hour, recompute
from benchmarks.gpu.hour_file import MANIFEST
from benchmarks.gpu.hour_parts import Part
from tokencomp.errors import OptionError

COMMANDS = {
    "good": "print('fine')",
    "bad": "raise SystemExit('broken')",
    "slow": "import time; time.sleep(60)",
}


def script(name: str, minutes: float = 1.0) -> Part:
    command = (sys.executable, "-c", COMMANDS[name])
    return Part(name, f"{name}?", minutes, command, command, False)


@pytest.fixture
def three(monkeypatch: pytest.MonkeyPatch) -> dict[str, Part]:
    """One part that ends well, one that fails, one that takes too long."""
    chosen = {"good": script("good"), "bad": script("bad"), "slow": script("slow", 0.01)}
    monkeypatch.setattr(hour, "parts", lambda model, folder: tuple(chosen.values()))
    return chosen


def statuses(folder: Path) -> dict[str, str]:
    manifest = json.loads((folder / MANIFEST).read_text())
    return {part["name"]: part["status"] for part in manifest["parts"]}


def test_every_end_is_noted_and_only_what_is_missing_runs_again(
    three: dict[str, Part], tmp_path: Path
) -> None:
    arguments = ["--rehearse", "--out", str(tmp_path)]
    assert hour.main(arguments) == 1
    assert statuses(tmp_path) == {"good": "done", "bad": "failed", "slow": "out of time"}
    good = script("good").command
    three.update({name: Part(name, "?", 1, good, good) for name in ("bad", "slow")})
    (tmp_path / "good/log.txt").write_text("as it was")
    assert hour.main(arguments) == 0
    assert (tmp_path / "good/log.txt").read_text() == "as it was"
    assert set(statuses(tmp_path).values()) == {"done"}


def _clean() -> dict[str, Any]:
    facts = {"date": "2026-11-28", "versions": {"torch": "2"}, "hardware": {"gpus": ["H100"]}}
    return {**facts, "commit": "0" * 40}


@pytest.mark.usefixtures("three")
def test_a_result_comes_into_the_page_and_a_rehearsal_does_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(hour, "environment", _clean)
    hour.hour("models/m", tmp_path / "hour/h100", rehearse=False)
    assert recompute.main(["--results", str(tmp_path)]) == 0
    page = (tmp_path / "tables.md").read_text()
    assert "H100; m; commit 000000000; 2026-11-28." in page
    assert "| good? | [good](hour/h100/good) | done | 0.0 of 1 |" in page
    hour.hour("models/m", tmp_path / "hour/cpu", rehearse=True)
    with pytest.raises(OptionError, match="a rehearsal measures nothing"):
        recompute.main(["--results", str(tmp_path)])


@pytest.mark.long
@pytest.mark.skipif(not importlib.util.find_spec("lmms_eval"), reason="needs the extra [eval]")
def test_the_rehearsal_takes_every_part(tmp_path: Path) -> None:
    assert hour.main(["--rehearse", "--out", str(tmp_path)]) == 0
    assert set(statuses(tmp_path).values()) == {"done"}
    for name in ("decode", "memory"):
        assert json.loads((tmp_path / name / "profile.json").read_text())
    assert (tmp_path / "tower/tower.md").exists() and (tmp_path / "serving/loads.md").exists()
