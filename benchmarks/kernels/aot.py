"""Compile every Triton kernel ahead of time, without a GPU, and read the machine code.

    python -m benchmarks.kernels.aot [--targets 80 90 100] [--quick] [--ops OP ...] [--out FILE]

The kernels' own launchers run at real sizes with the launch itself replaced by a recorder, so what
is compiled is what would run: same arguments, specialisation, tile sizes and warps. From each cubin
the script reads registers, stack (spills), shared memory and whether tensor-core instructions are
present, with the tools that ship in the Triton wheel, and works out how many warps a multiprocessor
can hold at once. It writes ``aot.json`` and ``aot.md``, and fails if a kernel spills, exceeds the
architecture's limits or lacks tensor-core instructions. With ``--ops`` it compiles these alone and
keeps the file's rows of all others.
"""

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"
os.environ["TOKENCOMP_KERNELS_CHECK"] = "0"
if importlib.util.find_spec("triton") is None:
    sys.exit("error: compiling needs Triton, which has wheels for Linux: pip install triton")

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import ASTSource

from benchmarks import publishing
from benchmarks.experiment import Experiment
from benchmarks.kernels.cases import (
    CASES,
    OPS,
    Case,
    Setup,
    ccam,
    colsum,
    dpp,
    facility,
    gather,
    match,
    maxmin,
    mean_distance,
    merge,
    nearest,
    pool,
    topk_spans,
)
from benchmarks.kernels.launches import Launch, record, specialise

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TARGETS = [80, 90, 100]
# Shared memory that one block may use, bytes.
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
MULTIPROCESSORS = {80: 108, 90: 132, 100: 148}
TENSOR_CORE = re.compile(r"\b(HMMA|HGMMA|UTC\w*MMA)\b")
GLOBAL_LOAD = re.compile(r"\bLDG(?:STS)?\.\S*")
# A multiprocessor of any of them: registers, warps, blocks, and bytes of shared memory.
REGISTERS, WARPS, BLOCKS = 65536, 64, 32
SHARED = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}
# Kernels whose work is a matrix product.
DOTS = (
    "lse_kernel", "colsum_kernel", "match_kernel", "ccam_kernel", "gram_kernel", "closest_kernel",
)  # fmt: skip

# Configurations that the benchmark's sizes do not reach: other head sizes and short inputs.
EXTRA: list[Setup] = [
    colsum("64 rows x 4k keys, 8/8 heads of 96", 64, 4096, 8, 8, 96),
    colsum("64 rows x 729 keys, 16/16 heads of 72", 64, 729, 16, 16, 72),
    colsum("8 rows x 4k keys, 8/4 heads of 256", 8, 4096, 8, 4, 256),
    colsum("4k rows x 4k keys, 8/4 heads of 256", 0, 4096, 8, 4, 256),
    colsum("4k rows x 4k keys, 14/2 heads of 64", 0, 4096, 14, 2, 64),
    match("64 frames x 30 tokens x 896", 64, 30, 896),
    merge("1 segment x 8192 rows x 896", 1, 8192, 896),
    pool("16 frames x 14 x 14 x 896", 16, 14, 896),
    ccam("64 queries x 8 frames of 196, 8 heads of 72", 64, 8, 196, 8, 72),
    ccam("16 queries x 8 frames of 64, 4 heads of 16", 16, 8, 64, 4, 16),
    maxmin("9 spans x 576 tokens x 896, isolated start", 9, 576, 896, 0.25, start="isolated"),
    mean_distance("9 spans x 576 tokens x 896, mean distance", 9, 576, 896),
    dpp("4 spans x 30 tokens x 896, half kept", 4, 30, 896, 0.5),
    facility("4 spans x 30 tokens x 896, half kept", 4, 30, 896, 0.5),
    facility("1 span x 4096 tokens x 896, 16 kept", 1, 4096, 896, 16 / 4096),
    maxmin("1 span x 4096 cells x 192, half kept, rms", 1, 4096, 192, 0.5, metric="rms"),
    maxmin("1 span x 16384 cells x 192, 2 steps, rms", 1, 16384, 192, 2 / 16384, metric="rms"),
]
QUICK: list[Setup] = [
    colsum("64 rows x 16k keys, 28/4 heads of 128", 64, 16384, 28, 4, 128),
    colsum("8k rows x 8k keys causal, 28/4 heads of 128", 0, 8192, 28, 4, 128),
    match("32 frames x 196 tokens x 3584", 32, 196, 3584),
    nearest("32 frames x 14 x 14 x 3584, same place", 32, 14, 3584),
    merge("32 frames x 196 tokens x 3584, half kept", 32, 196, 3584),
    gather("7B layer, 8k rows, half kept", 1, 8192, 3584, 4, 128),
    pool("128 frames x 14 x 14 x 3584", 128, 14, 3584),
    ccam("1024 queries x 32 frames of 729, 9 heads of 128", 1024, 32, 729, 9, 128),
    maxmin("1 span x 6272 tokens x 3584, a quarter kept", 1, 6272, 3584, 0.25),
    maxmin("1 span x 16384 tokens x 3584, 2 steps", 1, 16384, 3584, 2 / 16384),
    maxmin("1 span x 16384 cells x 192, 2 steps, rms", 1, 16384, 192, 2 / 16384, metric="rms"),
    maxmin("9 spans x 576 tokens x 896, isolated start", 9, 576, 896, 0.25, start="isolated"),
    dpp("16 spans x 576 tokens x 3584, a quarter kept", 16, 576, 3584, 0.25),
    facility("16 spans x 576 tokens x 3584, a quarter kept", 16, 576, 3584, 0.25),
    topk_spans("16 spans of 576 and 729 scores", [576, 729] * 8),
    # Triton compiles an integer argument of 1 as a constant: one place per frame, one row.
    nearest("4 frames x 1 x 1 x 64, same place", 4, 1, 64),
    colsum("1 row x 8k keys, 1/1 heads of 64", 1, 8192, 1, 1, 64),
    ccam("1 query x 32 frames of 256, 1 head of 64", 1, 32, 256, 1, 64),
]


@dataclass
class Row:
    """The compiled form of one kernel in one configuration."""

    kernel: str
    case: str
    dtype: str
    target: str
    warps: int
    stages: int
    registers: int
    stack: int
    shared: int
    tensor_cores: bool
    load_bits: int  # widest load from global memory
    problems: list[str]


def resident_warps(row: Row) -> int:
    """Warps that one multiprocessor holds at once: what hides the latency of memory.

    Registers are allocated in units of 8 per thread; every block costs 1 KiB of shared memory more.
    """
    per_thread = (row.registers + 7) // 8 * 8
    blocks = min(
        BLOCKS,
        WARPS // row.warps,
        REGISTERS // (per_thread * 32 * row.warps),
        SHARED[int(row.target.removeprefix("sm_"))] // (row.shared + 1024),
    )
    return blocks * row.warps


def compile_one(launch: Launch, source: ASTSource, options: dict[str, Any], arch: int) -> Row:
    """Compile for ``sm_<arch>`` and inspect the cubin."""
    name = launch.kernel.__name__
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _tool("cuobjdump", "-res-usage", str(cubin))
        sass = _tool("nvdisasm", "-c", str(cubin))
    sizes = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|SHARED):(\d+)", usage)}
    shared = max(compiled.metadata.shared, sizes.get("SHARED", 0))
    row = Row(
        kernel=name,
        case=launch.case,
        dtype=launch.dtype,
        target=f"sm_{arch}",
        warps=compiled.metadata.num_warps,
        stages=compiled.metadata.num_stages,
        registers=sizes["REG"],
        stack=sizes.get("STACK", 0),
        shared=shared,
        tensor_cores=bool(TENSOR_CORE.search(sass)),
        load_bits=max((_bits(load) for load in GLOBAL_LOAD.findall(sass)), default=0),
        problems=[],
    )
    if row.stack or re.search(r"\b(LDL|STL)\b", sass):
        row.problems.append("spills")
    if row.registers > 255:
        row.problems.append("registers")
    if shared > SHARED_LIMIT[arch]:
        row.problems.append("shared memory")
    if name in DOTS and launch.dtype != "float32" and not row.tensor_cores:
        row.problems.append("no tensor-core instruction")
    return row


def compile_all(
    setups: list[Setup], dtypes: list[torch.dtype], arch: int, quiet: bool = True
) -> list[Row]:
    """Compile all different launches of `setups` for one architecture."""
    rows, seen = [], set()
    target = GPUTarget("cuda", arch, 32)
    for dtype in dtypes:
        for launch in record(setups, dtype, MULTIPROCESSORS[arch]):
            source, options = specialise(launch, target)
            shape = (source.hash(), options["num_warps"], options["num_stages"])
            if shape in seen:
                continue
            seen.add(shape)
            rows.append(compile_one(launch, source, options, arch))
            if not quiet:
                print(rows[-1], file=sys.stderr)
    return rows


def described(setup: Setup) -> Case:
    """The case of a setup, without memory behind its tensors."""
    return setup(torch.device("meta"), torch.bfloat16, 1.0)


def kept(file: Path, ops: list[str], setups: list[Setup]) -> list[Row]:
    """Rows of an earlier run that belong to cases of other ops."""
    others = {case.name for case in map(described, setups) if case.op not in ops}
    rows = [Row(**row) for row in json.loads(file.read_text())["rows"]]
    return [row for row in rows if row.case in others]


def in_order(rows: list[Row], setups: list[Setup]) -> list[Row]:
    """As a run over everything has them: by architecture, dtype and case."""
    cases = [described(setup).name for setup in setups]
    targets, dtypes = [f"sm_{arch}" for arch in TARGETS], ["bfloat16", "float32"]
    return sorted(
        rows, key=lambda r: (targets.index(r.target), dtypes.index(r.dtype), cases.index(r.case))
    )


def page(stored: dict[str, Any]) -> str:
    """The page: one line per kernel, the worst of its configurations."""
    rows, body = [Row(**row) for row in stored["rows"]], []
    for name in dict.fromkeys(r.kernel for r in rows):
        own = [r for r in rows if r.kernel == name]
        products = all(r.tensor_cores for r in own if r.dtype != "float32")
        body.append(
            [
                *(name, str(len(own)), str(max(r.registers for r in own))),
                str(max(r.stack for r in own)),
                f"{max(r.shared for r in own) / 1024:.1f}",
                str(min(resident_warps(r) for r in own)),
                "yes" if products else "–",
                ", ".join(dict.fromkeys(p for r in own for p in r.problems)) or "none",
            ]
        )
    head = (
        "kernel", "compiled", "registers, at most", "stack bytes (spills)", "shared KiB, at most",
        "warps per SM, at least", "tensor cores in bf16", "problems",
    )  # fmt: skip
    targets = ", ".join(dict.fromkeys(r.target for r in rows))
    return (
        f"# Do the kernels compile without spills?\n\n{publishing.table(head, body)}\n\n"
        f"Compiled for {targets} (A100, H100, B200), without a GPU: every configuration is in "
        "[aot.json](aot.json). `python -m benchmarks.kernels.aot`."
    )


def measure(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Compile everything; the exit code is 1 on any problem."""
    setups = QUICK if args.quick else CASES + EXTRA
    dtypes = [torch.bfloat16] if args.quick else [torch.bfloat16, torch.float32]
    chosen = [setup for setup in setups if described(setup).op in args.ops]
    rows = [row for arch in args.targets for row in compile_all(chosen, dtypes, arch, quiet=False)]
    if len(args.ops) < len(OPS):
        rows = in_order(rows + kept(args.out, args.ops, setups), setups)
    about = {"triton": triton.__version__, "torch": torch.__version__}
    yield {**about, "rows": [asdict(row) for row in rows]}
    bad = [row for row in rows if row.problems]
    for row in bad:
        print(f"{row.kernel} ({row.case}, {row.dtype}, {row.target}): {', '.join(row.problems)}")
    print(f"{len(rows)} kernels compiled, {len(bad)} with problems")
    if bad:
        raise SystemExit(1)


def _tool(name: str, *arguments: str) -> str:
    result = subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True, check=True)
    return result.stdout


def _bits(load: str) -> int:
    """Width of a load instruction, e.g. ``LDGSTS.E.BYPASS.128``; 32 where none is written."""
    return next((int(part) for part in load.split(".") if part in ("64", "128", "256")), 32)


OPTIONS = {
    "targets": (list(TARGETS), "", TARGETS),
    "quick": (False, "a few configurations, bf16"),
    "ops": (list(OPS), "compile only these", OPS),
}
EXPERIMENT = Experiment("kernels/aot", measure, page, options=OPTIONS)


if __name__ == "__main__":
    EXPERIMENT.main(__doc__)
