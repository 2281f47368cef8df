"""Every kernel compiles for sm_80 and sm_90 without a GPU, spills nothing, uses tensor cores."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "kernels" / "aot.py"
KERNELS = {
    "lse_kernel", "combine_kernel", "colsum_kernel", "match_kernel", "nearest_kernel",
    "merge_kernel", "gather_kernel", "pool_kernel", "ccam_kernel", "unit_kernel", "gram_kernel",
    "greedy_kernel", "step_kernel",
}  # fmt: skip


TENSOR_CORE_KERNELS = {"lse_kernel", "colsum_kernel", "match_kernel", "ccam_kernel", "gram_kernel"}


@pytest.mark.skipif(sys.platform != "linux", reason="Triton has wheels for Linux only")
@pytest.mark.parametrize("arch", [80, 90])
def test_compiles_ahead_of_time(arch: int, tmp_path: Path) -> None:
    """No skip on Linux: `pip install -e ".[dev]"` brings Triton, and its wheel the CUDA tools."""
    # Its own process: kernels are defined for the compiler or the interpreter, not both.
    env = {k: v for k, v in os.environ.items() if not k.startswith(("TRITON_INTERPRET", "TOKEN"))}
    result = subprocess.run(
        [sys.executable, SCRIPT, "--quick", "--targets", str(arch), "--out", tmp_path],
        capture_output=True,
        text=True,
        env={**env, "TRITON_CACHE_DIR": str(tmp_path / "cache")},
        timeout=1200,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    rows = json.loads((tmp_path / "aot.json").read_text())["rows"]
    assert {row["kernel"] for row in rows} == KERNELS
    for row in rows:
        assert row["stack"] == 0 and 0 < row["registers"] <= 255, row
    assert {r["kernel"] for r in rows if r["tensor_cores"]} == TENSOR_CORE_KERNELS
