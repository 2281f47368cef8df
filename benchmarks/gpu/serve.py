"""A server under load: one server, all ratios in turn at every number of clients.

    python -m benchmarks.gpu.serve --model FOLDER --engine vllm --out loads.jsonl   # → loads.md

No cache has seen the pictures of a request. The file has the seconds of every request, from which
first tokens and requests per second follow.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from benchmarks import publishing
from benchmarks.experiment import Experiment
from benchmarks.gpu.load import Work, load, server
from tokencomp.inputs.packaged import DEFAULT_MODEL

ARGUMENTS: dict[str, tuple[str, ...]] = {
    "vllm": (
        "--max-model-len", "8192", "--", "--mm-processor-cache-gb", "0",
        "--no-enable-prefix-caching", "--max-num-seqs", "64",
    ),
    "hf": ("--max-batch", "16"),
}  # fmt: skip
"""Of `tokencomp serve`, by engine."""
COLUMNS = (
    "clients", "ratio", "requests", "failed", "first token, ms", "95 %", "×", "requests/s", "×",
    "text pieces/s",
)  # fmt: skip


def measure(args: argparse.Namespace) -> Iterator[list[dict[str, Any]]]:
    """All loads, one after the other."""
    work, loads = Work(args.images, args.side, args.tokens), []
    arguments = ["--engine", args.engine, *ARGUMENTS[args.engine]]
    with server(args.model, arguments, args.out.with_suffix(".log")) as address:
        for ratio in args.ratios:  # compiles kernels, fills pools
            load(address, ratio, 1, 1, 10**6 + round(1000 * ratio), work)
        every = itertools.product(args.clients, args.ratios)
        for number, (clients, ratio) in enumerate(every, 1):
            print(f"{clients} clients at ratio {ratio:g}", flush=True)
            count = max(args.least, args.per_client * clients)
            found = load(address, ratio, clients, count, 10**4 * number, work)
            loads.append({"clients": clients, "ratio": ratio, **found})
            yield loads


def page(loads: Sequence[dict[str, Any]]) -> str:
    """One line per number of clients and ratio, with factors against ratio 0."""
    base = {load["clients"]: load for load in loads if load["ratio"] == 0}
    rows = [cells(load, base[load["clients"]]) for load in loads]
    note = (
        "First token: median and 95th percentile over the answered requests. Factors (×) are "
        "against ratio 0 at as many clients."
    )
    return f"# A server under load\n\n{publishing.table(COLUMNS, rows)}\n\n{note}"


def cells(load: dict[str, Any], base: dict[str, Any]) -> list[str]:
    """A line of the table."""
    times, reference = first_tokens(load), first_tokens(base)
    sent = len(load["requests"])
    head = [str(load["clients"]), f"{load['ratio']:g}", str(sent), str(sent - len(times))]
    if not times or not reference:
        return [*head, *["–"] * (len(COLUMNS) - len(head))]
    median, rate = statistics.median(times), len(times) / load["seconds"]
    pieces = sum(request.get("pieces", 0) for request in load["requests"]) / load["seconds"]
    return [
        *head,
        f"{1e3 * median:.0f}",
        f"{1e3 * np.percentile(times, 95, method='inverted_cdf'):.0f}",
        f"{statistics.median(reference) / median:.2f}",
        f"{rate:.2f}",
        f"{rate / (len(reference) / base['seconds']):.2f}",
        f"{pieces:.0f}",
    ]


def first_tokens(load: dict[str, Any]) -> list[float]:
    """Seconds to the first token of the requests that were answered."""
    return [request["first"] for request in load["requests"] if "error" not in request]


OPTIONS = {
    "model": DEFAULT_MODEL,
    "engine": ("vllm", "", (*ARGUMENTS,)),
    "ratios": ([0.0, 0.75], "ratio 0 among them"),
    "clients": [1, 16],
    "per_client": 2,
    "least": (16, "requests of a load"),
    "images": (2, "of a request"),
    "side": (1008, "pixels"),
    "tokens": (64, "of the longest answer"),
}
EXPERIMENT = Experiment("gpu/loads", measure, page, options=OPTIONS, lines=True)


if __name__ == "__main__":
    EXPERIMENT.main(__doc__)
