"""The kernel benchmark runs without a GPU; its roofline is arithmetic, checked by hand."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.kernels import roofline

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "benchmarks" / "kernels"


def run(script: str, *arguments: object) -> str:
    """Run a script of the benchmark and return what it prints."""
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(
        [sys.executable, "-m", f"benchmarks.kernels.{script}", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=env,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.long
def test_runs_on_a_cpu(tmp_path: Path) -> None:
    """One line per case and provider, with all that is needed to judge it."""
    out = tmp_path / "cpu.jsonl"
    ops = ["topk_stable", "gather_rows"]
    run("run", "--ops", *ops, "--scale", 0.01, "--repeats", 1, "--out", out)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert {(r["op"], r["provider"]) for r in rows} == {
        (op, provider) for op in ops for provider in ("naive", "eager", "compile")
    }
    for row in rows:
        if row["provider"] == "compile" and "failed" in row:
            continue  # no C++ compiler on this machine
        assert 0 < row["p20_s"] <= row["median_s"] <= row["p80_s"]
        assert row["bytes_per_s"] == pytest.approx(row["bytes"] / row["median_s"])
        assert set(row["roofline_s"]) == {"A100 SXM 80 GB", "H100 SXM", "H200 SXM"}
        assert row["versions"]["torch"] and row["hardware"] and row["date"] and row["scale"] == 0.01


def test_recorded_roofline_is_that_of_the_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["roofline", "--out", str(tmp_path / "roofline.md")])
    roofline.main()
    table = (tmp_path / "roofline.md").read_text()
    assert table == (FOLDER / "roofline.md").read_text()
    # 7B layer, 8k rows, half kept, bf16: hidden 3584, cos, sin, K and V of 4 x 128 each, a mask of
    # bool and three int64 positions, read and written once: 4096 rows.
    moved = 2 * 4096 * (2 * (3584 + 2 * 128 + 2 * 4 * 128) + 1 + 3 * 8)
    line = next(line for line in table.splitlines() if "7B layer" in line)
    cells = [cell.strip() for cell in line.split("|")]
    assert cells[3] == f"{moved / 1e6:.2f}"
    assert cells[6:9] == [f"{moved / rate * 1e-6:.1f} m" for rate in (2.039, 3.352, 4.8)]
