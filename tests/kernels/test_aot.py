"""Every kernel compiles for sm_80 and sm_90 without a GPU, without spills, with tensor cores."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "kernels" / "aot.py"
KERNELS = {
    "lse_kernel", "combine_kernel", "colsum_kernel", "match_kernel", "nearest_kernel",
    "merge_kernel", "gather_kernel", "pool_kernel", "ccam_kernel", "norm_kernel", "gram_kernel",
    "greedy_kernel", "closest_kernel", "difference_kernel", "closest_difference_kernel",
    "mean_kernel", "first_kernel", "isolated_kernel", "cholesky_kernel", "cover_kernel",
    "facility_kernel", "rank_kernel", "pack_kernel",
}  # fmt: skip


TENSOR_CORE_KERNELS = {
    "lse_kernel", "colsum_kernel", "match_kernel", "ccam_kernel", "gram_kernel", "closest_kernel",
}  # fmt: skip


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="Triton has wheels for Linux only")
@pytest.mark.parametrize("arch", [80, 90])
def test_compiles_ahead_of_time(arch: int, tmp_path: Path) -> None:
    """On Linux the test never skips: `.[dev]` installs Triton, whose wheel has the CUDA tools."""
    # It needs its own process, as a process defines kernels for the compiler or the interpreter.
    env = {k: v for k, v in os.environ.items() if not k.startswith(("TRITON_INTERPRET", "TOKEN"))}
    command = [sys.executable, "-m", "benchmarks.kernels.aot", "--quick"]
    result = subprocess.run(
        [*command, "--targets", str(arch), "--out", tmp_path / "aot.json"],
        cwd=SCRIPT.parents[2],
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
