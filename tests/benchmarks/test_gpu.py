"""The GPU benchmark takes all its steps on a CPU, and goes on where it stopped."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import publishing
from benchmarks.gpu import measurements, page, prefill
from benchmarks.gpu.prompts import Prompt

ROOT = Path(__file__).parents[2]


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two reducers at one ratio instead of all."""
    monkeypatch.setattr(measurements, "REDUCERS", ("uniform", "condiv"))
    monkeypatch.setattr(measurements, "COMPARED", ("condiv",))
    monkeypatch.setattr(measurements, "RATIOS", (0.5,))


@pytest.mark.usefixtures("short")
def test_a_dry_run_takes_every_step_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--dry-run", "--out", str(tmp_path)]
    assert prefill.main(arguments) == 0
    (path,) = tmp_path.glob("*.jsonl")
    records = [json.loads(line) for line in path.read_text().splitlines()]
    steps = list(dict.fromkeys(r["step"] for r in records))
    assert steps == capsys.readouterr().out.splitlines()
    times = [r for r in records if r["step"] == "prefill, tiny, 2 images"]
    assert [(r["reducer"], r["ratio"]) for r in times] == [
        ("ratio 0", 0.0), ("uniform", 0.5), ("condiv", 0.5),
    ]  # fmt: skip
    assert [r["achieved_ratio"] for r in times] == [0, 0.5, 0.5]
    assert [r["flop_limit"] > 1.2 for r in times] == [False, True, True]
    agreement = [r for r in records if r["step"].startswith("backends")]
    assert all(r["same_tokens_kept"] and r["same_next_token"] for r in agreement)
    # An interruption in the third step: the second run takes this step and what follows.
    kept = [r for r in records if r["step"] in steps[:2]]
    path.write_text("".join(json.dumps(r) + "\n" for r in kept))
    assert prefill.main(arguments) == 0
    assert capsys.readouterr().out.splitlines() == steps[2:]
    again = [json.loads(line) for line in path.read_text().splitlines()]
    assert again[: len(kept)] == kept
    assert list(dict.fromkeys(r["step"] for r in again)) == steps
    assert "| tiny | 1 video | condiv | 0.5 |" in (tmp_path / "prefill.md").read_text()


def test_overhead_is_what_a_short_text_does_not_cost() -> None:
    stats = SimpleNamespace(flops_before=30, flops_after=10, ratio=0.5)
    times = [4.0, 5.0, 6.0], [2.0, 2.0, 9.0], [1.0, 1.5, 1.5]
    record = measurements._record(("bipartite", 0.5), Prompt(2, (1, 4, 4)), *times, stats)
    assert (record["overhead"], record["speedup"]) == (0.1, 2.5)
    off = measurements._record(("ratio 0", 0.0), Prompt(2, (1, 4, 4)), *times[:2], [], stats)
    assert off["overhead"] == -0.6


def test_a_dry_run_is_never_published(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        prefill.main(["--dry-run"])
    assert "measures nothing" in capsys.readouterr().err


def test_the_page_says_that_no_gpu_has_run() -> None:
    folder = ROOT / "benchmarks" / "gpu"
    records = [r for path in sorted(folder.glob("*.jsonl")) for r in publishing.read_lines(path)]
    assert (folder / "prefill.md").read_text() == page.page(records)
    assert ("No GPU has run" in page.page(records)) == (not records)
