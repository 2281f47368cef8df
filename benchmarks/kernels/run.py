"""Time the kernels against PyTorch and the roofline.

    python -m benchmarks.kernels.run [--ops OP ...] [--providers P ...] [--scale S] [--out FILE]

One JSON line per case and provider: latency quantiles, achieved bandwidth and FLOP/s with their
share of the data-sheet peak, peak memory, the roofline time on A100, H100 and H200, versions,
commit, hardware and date. Providers: ``naive`` (the CPU path), ``eager`` (whole matrices in
PyTorch), ``compile`` (torch.compile of eager), ``triton`` and, where installed,
``flash-colreduce``. Without a GPU only the first three run, at reduced sizes: those lines say
nothing about the Triton kernels. On a GPU the value checks are off: they wait for the device. A
provider that fails (out of memory, no C++ compiler) leaves a line that says so.
"""

import functools
import json
import os
import platform
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks import publishing
from benchmarks.kernels.cases import CASES, OPS, Case
from benchmarks.kernels.roofline import GPUS, bound, find, floor_seconds
from tokencomp.evaluation import timing

PROVIDERS = ("naive", "eager", "compile", "triton", "flash-colreduce")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def providers(case: Case, names: list[str], gpu: bool) -> Iterator[tuple[str, Callable[[], Any]]]:
    """The calls that can run on this machine, by name."""
    for name in names:
        if name in ("naive", "triton"):
            if name == "naive" or gpu:
                yield name, case.call
        elif case.eager is not None and name == "eager":
            yield name, functools.partial(case.eager, *case.arguments)
        elif case.eager is not None and name == "compile":
            yield name, functools.partial(torch.compile(case.eager), *case.arguments)
        elif name in case.others and gpu:
            yield name, case.others[name]


def measure(call: Callable[[], Any], gpu: bool, repeats: int) -> dict[str, float]:
    """Latency quantiles in seconds, and peak bytes above the inputs."""
    call()  # compilation, caches
    if gpu:
        import triton

        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        times = triton.testing.do_bench(call, warmup=100, rep=400, quantiles=[0.5, 0.2, 0.8])
        median, low, high = (t / 1e3 for t in times)
        return {"median_s": median, "p20_s": low, "p80_s": high, "peak_bytes": peak}
    times = sorted(timing.seconds(call) for _ in range(repeats))
    return {
        "median_s": statistics.median(times),
        "p20_s": times[len(times) // 5],
        "p80_s": times[-1 - len(times) // 5],
    }


def line(case: Case, provider: str, times: dict[str, float], device_name: str) -> dict[str, Any]:
    """One result with what is needed to judge it."""
    peak = find(device_name)
    work = (case.flops, case.bytes, case.tensor_cores)
    row: dict[str, Any] = {
        "op": case.op,
        "case": case.name,
        "provider": provider,
        **times,
        "flops": case.flops,
        "bytes": case.bytes,
        "flops_per_byte": case.flops / case.bytes,
        "bytes_per_s": case.bytes / times["median_s"],
        "flop_per_s": case.flops / times["median_s"],
        "roofline_s": {gpu.name: floor_seconds(*work, gpu) for gpu in GPUS},
        "bound": {gpu.name: bound(*work, gpu) for gpu in GPUS},
    }
    if peak is not None:
        row["roofline_share"] = floor_seconds(*work, peak) / times["median_s"]
    return row


def main() -> None:
    """Run the cases and write JSON lines."""
    parser = publishing.parser(__doc__, report=False)
    parser.add_argument("--ops", nargs="+", choices=OPS, default=OPS)
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS, default=list(PROVIDERS))
    parser.add_argument("--dtype", choices=DTYPES, default=None, help="default: bf16, on CPU fp32")
    parser.add_argument("--scale", type=float, default=None, help="default: 1, on a CPU 1/16")
    parser.add_argument("--repeats", type=int, default=5, help="timed calls on a CPU")
    arguments = parser.parse_args()
    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    device_name = torch.cuda.get_device_name() if gpu else platform.processor() or "CPU"
    arguments.scale = arguments.scale or (1.0 if gpu else 1 / 16)
    arguments.dtype = arguments.dtype or ("bf16" if gpu else "fp32")
    out = arguments.out or Path(__file__).parent / ("gpu.jsonl" if gpu else "cpu.jsonl")
    if not gpu:
        print(
            f"No GPU is present: plain PyTorch at {arguments.scale:g} of the sizes; no line "
            "is a measurement of the Triton kernels."
        )
    facts = publishing.published_from(out, arguments.allow_dirty)
    sizes = {"scale": arguments.scale, "dtype": arguments.dtype, "device": device_name}
    info = {**publishing.environment(), "cuda": torch.version.cuda, **sizes, **facts}
    torch.manual_seed(0)
    with out.open("w") as file, torch.inference_mode():
        for setup in tqdm(CASES, unit="case"):
            case = setup(device, DTYPES[arguments.dtype], arguments.scale)
            if case.op not in arguments.ops:
                continue
            for provider, call in providers(case, arguments.providers, gpu):
                os.environ["TOKENCOMP_KERNELS"] = "triton" if provider == "triton" else "naive"
                os.environ["TOKENCOMP_KERNELS_CHECK"] = "0" if gpu else "1"
                try:
                    times = measure(call, gpu, arguments.repeats)
                except RuntimeError as error:  # out of memory, or nothing to compile with
                    failed = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
                    result = {"op": case.op, "case": case.name, "provider": provider}
                    result["failed"] = failed[:200]
                else:
                    result = line(case, provider, times, device_name)
                file.write(json.dumps({**result, **info}) + "\n")
                tqdm.write(summary(result))


def summary(result: dict[str, Any]) -> str:
    """One line for the terminal."""
    head = f"{result['op']:24} {result['case']:52} {result['provider']:16}"
    if "failed" in result:
        return f"{head} {result['failed']}"
    floors = " ".join(f"{v * 1e6:.1f}" for v in result["roofline_s"].values())
    share = f"  {result['roofline_share']:.0%} of roofline" if "roofline_share" in result else ""
    return f"{head} {result['median_s'] * 1e6:10.1f} us  (A100/H100/H200 floor {floors}){share}"


if __name__ == "__main__":
    main()
