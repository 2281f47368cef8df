"""Cost of the vLLM plugin at ratio 0 against vLLM without it, and what the measurement resolves.

    python -m benchmarks.serving.ratio_zero             # → ratio_zero.jsonl, ratio_zero.md
    python -m benchmarks.serving.ratio_zero --report    # only rebuilds the page

Two engines in one process answer the same videos in turn, the order reversed from round to round
(ABBA): vLLM's classes, and the plugin set to ratio 0. The difference of neighbouring requests of
one arm shows what the measurement resolves. The engines share a process, because two processes of
one arm differ as well; every process builds them in another order.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Iterator
from typing import Any

from benchmarks.experiment import Experiment
from benchmarks.serving.run import PLAN, SHAPE, SIZES, random_model, run, vllm_version

STOCK, OURS = "vLLM", "tokencomp, ratio 0"
ARMS: dict[str, dict[str, Any]] = {
    STOCK: {"engine": {}, "request": None},
    OURS: {"engine": {"hf_overrides": {"tokencomp": {}}}, "request": {"ratio": 0}},
}


def quartiles(values: list[float]) -> str:
    """Median and quartiles of fractions, in percent."""
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:+.1%} (quartiles {low:+.1%} and {high:+.1%})"


def page(rows: list[dict[str, Any]]) -> str:
    """The page from the records of one run."""
    lines = ["| process | arm | first token, CPU ms, median |", "|---:|---|---:|"]
    differences, noise = [], []
    for number, row in enumerate(rows, start=1):
        stock, ours = row["arms"][STOCK]["cpu"], row["arms"][OURS]["cpu"]
        differences += [b / a - 1 for a, b in zip(stock, ours, strict=True)]
        for values in (stock, ours):
            noise += [b / a - 1 for a, b in itertools.pairwise(values)]
        for arm, result in row["arms"].items():
            lines.append(f"| {number} | {arm} | {1e3 * result['cpu_median_s']:.0f} |")
    method = (__doc__ or "").split("\n\n", 2)[2].strip()
    return (
        "# What does the vLLM plugin cost at ratio 0?\n\nIts CPU time differs from vLLM's by "
        f"{quartiles(differences)}, over {len(differences)} pairs of requests. Neighbouring "
        f"requests of one arm differ by {quartiles(noise)}.\n\n{method}\n\n"
        + "\n".join(lines)
        + f"\n\nSetup: {json.dumps(rows[-1]['setup'])}."
    )


def measure(args: argparse.Namespace) -> Iterator[list[dict[str, Any]]]:
    """A row per process; every second one builds its engines in the other order."""
    shape = {**SHAPE, "rounds": args.rounds}
    about = {"vllm": vllm_version(), "hidden": args.hidden, "layers": args.layers, **shape}
    rows: list[dict[str, Any]] = []
    with random_model(args) as (model, work):
        for number in range(args.processes):
            names = [OURS, STOCK] if number % 2 else [STOCK, OURS]
            arms = {name: ARMS[name] for name in names}
            plan = {**PLAN, **shape, "job": "turns", "plugin": True, "arms": arms}
            found = run(model, plan, work)
            if failed := [r["failed"] for r in found.values() if "failed" in r]:
                raise SystemExit(f"an engine failed: {failed[0]}")
            rows.append({"arms": found, "setup": about})
            print({name: r["cpu_median_s"] for name, r in found.items()}, flush=True)
            yield rows


OPTIONS = {"rounds": 24, "processes": 2, **SIZES}
EXPERIMENT = Experiment("serving/ratio_zero", measure, page, options=OPTIONS, lines=True)


if __name__ == "__main__":
    EXPERIMENT.main(__doc__)
