"""What is measured on a GPU: parts and their tables, on a CPU."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from benchmarks.gpu import hour, serve
from benchmarks.gpu.hour import MANIFEST, Part

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
    assert (tmp_path / "README.md").read_text().count("| done |") == 3


@pytest.mark.long
@pytest.mark.skipif(not importlib.util.find_spec("lmms_eval"), reason="needs the extra [eval]")
def test_the_rehearsal_takes_every_part(tmp_path: Path) -> None:
    assert hour.main(["--rehearse", "--out", str(tmp_path)]) == 0
    assert set(statuses(tmp_path).values()) == {"done"}
    assert (tmp_path / "weights/decoding.md").exists()
    for name in ("decode", "memory"):
        assert json.loads((tmp_path / name / "profile.json").read_text())
    assert (tmp_path / "prefill/prefill.md").exists() and (tmp_path / "tower/tower.md").exists()
    assert (tmp_path / "serving/loads.md").exists()


def test_the_table_follows_from_the_times() -> None:
    """20 requests a setting, the fastest first."""
    loads = [
        {
            "ratio": ratio, "clients": 8, "seconds": seconds,
            "requests": [
                {"first": 0.01 * factor * (k + 1), "total": 1.0, "pieces": 10} for k in range(20)
            ],
        }
        for ratio, seconds, factor in ((0.0, 10.0, 2), (0.75, 5.0, 1))
    ]  # fmt: skip
    # The median of 10 … 200 ms is 105 ms, half of ratio 0's; 20 requests in 5 s, against 10 s.
    assert "| 8 | 0.75 | 20 | 0 | 105 | 190 | 2.00 | 4.00 | 2.00 | 40 |" in serve.page(loads)
    loads[1]["requests"][19] = {"error": "refused"}
    assert "| 8 | 0.75 | 20 | 1 | 100 | 190 | 2.10 | 3.80 | 1.90 | 38 |" in serve.page(loads)
