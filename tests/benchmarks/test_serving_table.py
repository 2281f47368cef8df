"""The table of serving under load: times by hand, and a trial with a server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import recompute, serve_table, tables
from benchmarks.gpu.contribution import read
from benchmarks.gpu.serving_file import ServingFile, percentile, table_lines

NAME = "serving-qwen2.5-vl-7b"


def made_up() -> dict[str, Any]:
    """A result file: 20 requests a setting, the fastest first."""
    loads = [
        {
            "ratio": ratio, "clients": 8, "seconds": seconds,
            "requests": [
                {"first": 0.01 * factor * (k + 1), "total": 1.0, "pieces": 10} for k in range(20)
            ],
        }
        for ratio, seconds, factor in ((0.0, 10.0, 2), (0.75, 5.0, 1))
    ]  # fmt: skip
    about = {
        "model": "m", "engine": "vllm", "work": {"images": 2}, "date": "2026-11-26",
        "commit": "0" * 40, "versions": {"vllm": "1"}, "hardware": {"gpus": ["H100"]},
    }  # fmt: skip
    return {"table": NAME, "about": about, "loads": loads}


def test_the_table_follows_from_the_times(tmp_path: Path) -> None:
    assert percentile(list(range(1, 21)), 0.95) == 19 and percentile([3.0], 0.95) == 3.0
    file = ServingFile.model_validate(made_up())
    row = [cell.strip() for cell in table_lines(file.loads)[3].strip("|").split("|")]
    # The median of 10 … 200 ms is 105 ms, half of ratio 0's; 20 requests in 5 s, against 10 s.
    assert row == ["8", "0.75", "20", "0", "105", "190", "2.00", "4.00", "2.00", "40"]
    path = tmp_path / NAME / "H100.json"
    path.parent.mkdir()
    path.write_text(file.model_dump_json())
    assert read(path) == file
    assert recompute.main(["--results", str(tmp_path)]) == 0
    assert "| 8 | 0.75 | 20 | 0 | 105 |" in (tmp_path / "tables.md").read_text()


@pytest.mark.long
def test_the_trial_serves_the_embedded_model(tmp_path: Path) -> None:
    """The command of the table, with the server that runs on any machine."""
    pytest.importorskip("starlette")
    assert tables.main([NAME, "--dry-run", "--runs", str(tmp_path)]) == 0
    file = tmp_path / "dry-run" / NAME / serve_table.RECORDS
    loads = [json.loads(line) for line in file.read_text().splitlines()]
    assert {load["ratio"] for load in loads} == {0.0, 0.75}
    for load in loads:
        assert all(0 < one["first"] <= one["total"] for one in load["requests"])
