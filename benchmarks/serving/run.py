"""Time to first token and throughput of vLLM with and without compression, on this machine.

    python benchmarks/serving/run.py [--out benchmarks/serving/results.json]

Engines run one after another in one go: stock vLLM; tokencomp's plugin, whose arms share one engine
because ratios are per request; vLLM's own EVS and VidCom2. Random weights, Qwen2.5-VL layout,
videos that no cache has seen. Needs vLLM (see the extra `vllm`).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SHAPE = {"frames": 16, "side": 224}  # 8 × 64 tokens
RATIOS = (0.5, 0.75)
REDUCERS = ("uniform", "merge", "evs", "vidcom2")
ENV = {
    "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "WARNING",
}  # fmt: skip


def engines() -> dict[str, tuple[bool, dict[str, Any], dict[str, Any]]]:
    """Name → (plugin on, engine arguments, arms)."""
    ours: dict[str, Any] = {"ratio 0": {"ratio": 0}}
    for reducer in REDUCERS:
        for ratio in RATIOS:
            ours[f"{reducer} {ratio}"] = {"reducer": reducer, "ratio": ratio}
    found = {
        "stock vLLM": (False, {}, {"uncompressed": None}),
        "tokencomp": (True, {}, ours),
    }
    for method in ("evs", "vidcom2"):
        for ratio in RATIOS:
            flags = {"video_pruning_rate": ratio, "video_pruning_method": method}
            found[f"vLLM {method} {ratio}"] = (False, flags, {f"{method} {ratio}": None})
    return found


def run(model: Path, plugin: bool, plan: dict[str, Any], work: Path) -> dict[str, Any]:
    """One engine process; a failure is a result too."""
    jobs, results = work / "plan.json", work / "results.json"
    jobs.write_text(json.dumps(plan))
    results.unlink(missing_ok=True)
    env = {**os.environ, **ENV, "TOKENCOMP_VLLM": "on" if plugin else "off"}
    command = [sys.executable, HERE / "engine.py", model, jobs, results]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode == 0 and results.exists():
        return json.loads(results.read_text())
    lines = [line for line in done.stderr.splitlines() if "Error" in line]
    return {"failed": lines[-1][-400:] if lines else f"exit code {done.returncode}"}


def table(results: dict[str, Any]) -> str:
    """Markdown. Factors are against the uncompressed arm of the same engine, else the stock one.

    Arms of one engine are interleaved. CPU time is that of the first token; it hardly depends on
    what else the machine does.
    """
    lines = [
        "| engine | arm | prompt tokens | first token, CPU ms | × | TTFT ms | requests/s | × |"
    ]
    lines.append("|---|---|---:|---:|---:|---:|---:|---:|")
    for engine, arms in results.items():
        if "failed" in arms:
            lines.append(f"| {engine} | does not run here: `{arms['failed'][:160]}` | | | | | | |")
            continue
        base = arms.get("ratio 0") or results["stock vLLM"]["uncompressed"]
        for name, x in arms.items():
            cpu, rate = x["cpu_median_s"], x["throughput_median_rps"]
            lines.append(
                f"| {engine} | {name} | {x['prompt']} | {1e3 * cpu:.0f} | "
                f"{base['cpu_median_s'] / cpu:.2f} | {1e3 * x['ttft_median_s']:.0f} | "
                f"{rate:.2f} | {rate / base['throughput_median_rps']:.2f} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE / "results.json")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=8)
    given = parser.parse_args()
    sys.path.insert(0, str(HERE))
    from model import build

    from tokencomp.evaluation.environment import environment

    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        (work / "model").mkdir()
        model = build(work / "model")
        for name, (plugin, engine, arms) in engines().items():
            plan = {
                "engine": engine, "arms": arms, **SHAPE,
                "rounds": given.rounds, "requests": given.requests,
            }  # fmt: skip
            results[name] = run(model, plugin, plan, work)
            print(name, "failed" if "failed" in results[name] else "done", flush=True)
            report = {"environment": environment(), "shape": SHAPE, "results": results}
            given.out.write_text(json.dumps(report, indent=1) + "\n")
            given.out.with_suffix(".md").write_text(table(results) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
