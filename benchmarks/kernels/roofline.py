"""The least time an op can take: bytes over bandwidth, FLOPs over peak, the larger of the two.

    python -m benchmarks.kernels.roofline [--out FILE]

writes this for every case of the benchmark at full size as a table. It is arithmetic on data-sheet
rates, not a measurement: what a run on a GPU is judged against.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import publishing

if TYPE_CHECKING:
    from benchmarks.kernels.case import Case


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


# The decoder of a 7B model (Qwen2-7B's shapes).
LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INNER = 28, 3584, 28, 4, 128, 18944
COLSUM, GATHER = "64 rows x 16k keys, 28/4 heads of 128", "7B layer, 8k rows, half kept"
# What a method does to a prompt: tokens, name, cases, choices that wait for one another (condiv's,
# which also reads the features of all rows for their mean distance).
STEPS: tuple[tuple[int, str, tuple[str, ...], int, int], ...] = (
    (
        8192,
        "aim: match + merge + colsum + gather",
        (
            "32 frames x 196 tokens x 3584",
            "32 frames x 196 tokens x 3584, half kept",
            COLSUM,
            GATHER,
        ),
        0,
        0,
    ),
    (
        8192,
        "condiv: colsum + mean distance + maxmin of 6272 tokens + gather",
        (COLSUM, "1 span x 6272 tokens x 3584, a quarter kept", GATHER),
        6272 // 4,
        6272,
    ),
    (
        16384,
        "condiv: colsum + mean distance + maxmin of 16384 tokens + gather",
        (COLSUM, "1 span x 16384 tokens x 3584, 5 % kept", GATHER),
        16384 // 20,
        16384,
    ),
)
# Seconds of a choice: one row from the L2 cache and one reduction, by one program. Assumed.
CHOICE = 1e-6
# Bytes per feature of a mean distance: bf16 read, fp32 written and read twice (plain PyTorch).
MEAN_BYTES = 14


def prefill_flops(tokens: int) -> float:
    """FLOPs of the decoder's matrix products over a prompt, attention causal."""
    projections = HIDDEN * HEAD_DIM * (2 * HEADS + 2 * KV_HEADS) + 3 * HIDDEN * INNER
    attention = 4 * HEADS * HEAD_DIM * tokens**2 / 2
    return LAYERS * (2 * projections * tokens + attention)


HEAD = """# Roofline of the kernels (arithmetic, nothing on this page was timed)

Unavoidable bytes and FLOPs at full size in bf16, and the least possible time in µs at data-sheet \
rates. m: memory bandwidth is the limit; c: FLOPs are the limit. \
[All benchmark pages](../README.md)."""
TARGET = (
    "The target is a reduce step of at most 2 % of a 7B prefill, and of at most 1 % for the "
    "default, condiv. The table compares the roofline time of a step with that of the "
    "decoder's matrix products. The brackets add a part that a roofline does not include: each "
    "of condiv's choices depends on the one before, and we assume that it takes "
    f"{CHOICE * 1e6:.0f} µs (one read from the L2 cache and one reduction)."
)


def table() -> str:
    """Bytes, FLOPs, intensity and roofline time of every case in bf16, as Markdown."""
    import torch

    from benchmarks.kernels.cases import CASES

    cases = [setup(torch.device("meta"), torch.bfloat16, 1.0) for setup in CASES]
    rows = []
    for case in cases:
        work = (case.flops, case.bytes, case.tensor_cores)
        times = [f"{floor_seconds(*work, g) * 1e6:.1f} {bound(*work, g)[0]}" for g in GPUS]
        sizes = (case.bytes / 1e6, case.flops / 1e9)
        numbers = [f"{size:.2f}" for size in sizes] + [f"{case.flops / case.bytes:.1f}"]
        rows.append([case.op, case.name, *numbers, *times])
    head = ("op", "case", "MB", "GFLOP", "FLOP/byte", *(gpu.name for gpu in GPUS))
    steps = shares({case.name: case for case in cases})
    return f"{HEAD}\n\n{publishing.table(head, rows)}\n\n{steps}\n"


def shares(cases: Mapping[str, Case]) -> str:
    """The share of a prefill that a reduce step takes, as Markdown."""
    body = []
    for tokens, name, parts, choices, rows in STEPS:
        cells = []
        for gpu in GPUS:
            works = [(cases[p].flops, cases[p].bytes, cases[p].tensor_cores) for p in parts]
            step = sum(floor_seconds(*work, gpu) for work in works)
            step += rows * HIDDEN * MEAN_BYTES / gpu.bandwidth
            prefill = prefill_flops(tokens) / gpu.tensor_flops
            waiting = f" ({(step + choices * CHOICE) / prefill:.2%})" if choices else ""
            cells.append(f"{step * 1e3:.2f} of {prefill * 1e3:.1f}, {step / prefill:.2%}{waiting}")
        body.append([name, str(tokens), str(choices or "-"), *cells])
    head = ("step", "tokens", "choices", *(f"{gpu.name}: ms of ms, share" for gpu in GPUS))
    return f"{TARGET}\n\n{publishing.table(head, body)}"


def main() -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "roofline.md")
    parser.parse_args().out.write_text(table())


if __name__ == "__main__":
    main()
