"""The least time an op can take: bytes over bandwidth, FLOPs over peak, the larger of the two.

    python -m benchmarks.kernels.roofline

writes roofline.csv: this for every case of the benchmark at full size. It is arithmetic on
data-sheet rates, not a measurement: what a run on a GPU is judged against.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from benchmarks import publishing
from benchmarks.experiment import Files, write


@dataclass(frozen=True)
class Gpu:
    """Data-sheet rates (dense): bytes/s, FLOP/s of bf16 tensor cores and of fp32."""

    name: str
    bandwidth: float
    tensor_flops: float
    vector_flops: float


GPUS = (
    Gpu("A100 SXM 80 GB", 2.039e12, 312e12, 19.5e12),
    Gpu("H100 SXM", 3.352e12, 989.4e12, 66.9e12),
    Gpu("H200 SXM", 4.8e12, 989.4e12, 66.9e12),
)


def floor_seconds(flops: float, size: float, tensor_cores: bool, gpu: Gpu) -> float:
    """Roofline time in seconds."""
    peak = gpu.tensor_flops if tensor_cores else gpu.vector_flops
    return max(size / gpu.bandwidth, flops / peak)


def bound(flops: float, size: float, tensor_cores: bool, gpu: Gpu) -> str:
    """``"memory"`` or ``"compute"``: which of the two the roofline time is."""
    peak = gpu.tensor_flops if tensor_cores else gpu.vector_flops
    return "memory" if size / gpu.bandwidth >= flops / peak else "compute"


def find(name: str) -> Gpu | None:
    """The entry for a device name as CUDA reports it, e.g. ``NVIDIA H100 80GB HBM3``."""
    return next((gpu for gpu in GPUS if gpu.name.split()[0] in name), None)


def rows() -> list[dict[str, Any]]:
    """Unavoidable bytes and FLOPs of every case in bf16, and the least time on every card."""
    import torch

    from benchmarks.kernels.cases import CASES

    cases = [setup(torch.device("meta"), torch.bfloat16, 1.0) for setup in CASES]
    found = []
    for case in cases:
        work = (case.flops, case.bytes, case.tensor_cores)
        row: dict[str, Any] = {"op": case.op, "case": case.name, "bytes": int(case.bytes)}
        row["flops"] = int(case.flops)
        for gpu in GPUS:
            row[f"us_{gpu.name}"] = floor_seconds(*work, gpu) * 1e6
            row[f"bound_{gpu.name}"] = bound(*work, gpu)
        found.append(row)
    return found


def files() -> Files:
    """The CSV file."""
    return {publishing.FOLDER / "kernels" / "roofline.csv": publishing.csv_text(rows())}


if __name__ == "__main__":
    write(files(), csv=True)
