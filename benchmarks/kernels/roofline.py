"""The least time an op can take: bytes over bandwidth, FLOPs over peak, the larger of the two.

    python benchmarks/kernels/roofline.py [--out FILE]

writes this for every case of the benchmark at full size as a table. It is arithmetic on data-sheet
rates, not a measurement: what a run on a GPU is judged against.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path


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


# The decoder of a 7B model (Qwen2-7B's shapes) and a prompt of this many tokens.
LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INNER, TOKENS = 28, 3584, 28, 4, 128, 18944, 8192
# One step of each kind that a method which merges at entry and prunes between layers takes.
STEP = (
    "32 frames x 196 tokens x 3584",
    "32 frames x 196 tokens x 3584, half kept",
    "64 rows x 16k keys, 28/4 heads of 128",
    "7B layer, 8k rows, half kept",
)


def prefill_flops() -> float:
    """FLOPs of the decoder's matrix products over the prompt, attention causal."""
    projections = HIDDEN * HEAD_DIM * (2 * HEADS + 2 * KV_HEADS) + 3 * HIDDEN * INNER
    attention = 4 * HEADS * HEAD_DIM * TOKENS**2 / 2
    return LAYERS * (2 * projections * TOKENS + attention)


def table() -> str:
    """Bytes, FLOPs, intensity and roofline time of every case in bf16, as Markdown."""
    import torch
    from cases import CASES

    cases = [setup(torch.device("meta"), torch.bfloat16, 1.0) for setup in CASES]
    names = [gpu.name for gpu in GPUS]
    lines = [
        "# Roofline of the kernels (arithmetic, nothing here was timed)",
        "",
        "Unavoidable bytes and FLOPs at full size in bf16, and the least time in µs on data-sheet "
        "rates: m where memory bounds it, c where the FLOPs do.",
        "",
        f"| op | case | MB | GFLOP | FLOP/byte | {' | '.join(names)} |",
        "|---|---|---|---|---|" + "---|" * len(GPUS),
    ]
    for case in cases:
        work = (case.flops, case.bytes, case.tensor_cores)
        times = [f"{floor_seconds(*work, g) * 1e6:.1f} {bound(*work, g)[0]}" for g in GPUS]
        lines.append(
            f"| {case.op} | {case.name} | {case.bytes / 1e6:.2f} | {case.flops / 1e9:.2f} | "
            f"{case.flops / case.bytes:.1f} | {' | '.join(times)} |"
        )
    chosen = [case for case in cases if case.name in STEP]
    steps = [sum(floor_seconds(c.flops, c.bytes, c.tensor_cores, g) for c in chosen) for g in GPUS]
    prefills = [prefill_flops() / g.tensor_flops for g in GPUS]
    shares = [f"{step / prefill:.2%}" for step, prefill in zip(steps, prefills, strict=True)]
    lines += [
        "",
        f"The target is a reduce step of at most 2 % of a 7B prefill. For {TOKENS} tokens the "
        "decoder's matrix products take at least:",
        "",
        f"| | {' | '.join(names)} |",
        "|---|" + "---|" * len(GPUS),
        f"| prefill, ms | {' | '.join(f'{t * 1e3:.1f}' for t in prefills)} |",
        f"| match + merge + colsum + gather, ms | {' | '.join(f'{t * 1e3:.2f}' for t in steps)} |",
        f"| share | {' | '.join(shares)} |",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "roofline.md")
    parser.parse_args().out.write_text(table())


if __name__ == "__main__":
    main()
