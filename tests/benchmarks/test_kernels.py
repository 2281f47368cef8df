"""The kernel benchmark runs without a GPU; its roofline is arithmetic, checked by hand."""

import csv
import sys
from pathlib import Path

import pytest

from benchmarks.kernels import roofline

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "benchmarks" / "kernels"


def test_recorded_roofline_is_that_of_the_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["roofline", "--out", str(tmp_path / "roofline.csv")])
    roofline.main()
    table = (tmp_path / "roofline.csv").read_text()
    assert table == (FOLDER / "roofline.csv").read_text()
    # 7B layer, 8k rows, half kept, bf16: hidden 3584, cos, sin, K and V of 4 x 128 each, a mask of
    # bool and three int64 positions, read and written once: 4096 rows.
    moved = 2 * 4096 * (2 * (3584 + 2 * 128 + 2 * 4 * 128) + 1 + 3 * 8)
    row = next(r for r in csv.DictReader(table.splitlines()) if "7B layer" in r["case"])
    assert int(row["bytes"]) == moved
    for gpu, rate in (("A100 SXM 80 GB", 2.039), ("H100 SXM", 3.352), ("H200 SXM", 4.8)):
        assert float(row[f"us_{gpu}"]) == pytest.approx(moved / rate * 1e-6, rel=1e-4)
        assert row[f"bound_{gpu}"] == "memory"
