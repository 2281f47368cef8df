"""The kernel benchmark runs without a GPU; its roofline is arithmetic, checked by hand."""

import sys
from pathlib import Path

import pytest

from benchmarks.kernels import roofline

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "benchmarks" / "kernels"


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
