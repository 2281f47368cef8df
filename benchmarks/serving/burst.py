"""How long does a burst of requests wait for its first tokens, with and without a ratio by load?

    python -m benchmarks.serving.burst             # → burst.jsonl, burst.md
    python -m benchmarks.serving.burst --report    # only rebuilds the page

One `tokencomp serve --engine vllm --ratio-by-load` answers both arms, which take turns: requests
that name the usual ratio, which the load never changes, and the same ones without. A burst comes at
several times the rate at which the server answers at its usual ratio, measured right before; then
the server is left alone until its step ends. No cache has seen the images. Weights are random.
Needs vLLM and the extra `serve`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from benchmarks import publishing
from benchmarks.experiment import Experiment
from benchmarks.gpu.load import image_part, post, server
from benchmarks.serving.engine import request
from benchmarks.serving.run import ENV, SIZES, random_model, vllm_version

ARMS = {"the usual ratio": True, "a ratio by load": False}
"""Whether requests name the usual ratio."""
CALM = 60.0  # seconds after which no step should be in force
COLUMNS = (
    "round", "arm", "burst, requests/s", "TTFT median, s", "TTFT p95, s", "×", "last answer, s",
    "requests by ratio",
)  # fmt: skip


def body(seed: int, args: argparse.Namespace, named: bool) -> bytes:
    """A request about images that no cache has seen."""
    content: list[dict[str, Any]] = [{"type": "text", "text": "What is it?"}]
    for i in range(args.images):
        noise = request(seed * args.images + i, 1, args.side, None, "image")
        content.insert(0, image_part(noise["multi_modal_data"]["image"]))
    fields = {
        "messages": [{"role": "user", "content": content}], "max_tokens": args.answer,
        "temperature": 0, "ignore_eos": True, "stream": True,
        "stream_options": {"include_usage": True},
        **({"tokencomp": {"ratio": args.ratio}} if named else {}),
    }  # fmt: skip
    return json.dumps(fields).encode()


def ask(url: str, content: bytes) -> dict[str, float]:
    """Seconds to the first event and to the end of an answer, and its ratio and visual tokens."""
    sent, first, last = time.perf_counter(), 0.0, b""
    with post(url, content) as answer:
        for line in answer:
            first = first or time.perf_counter() - sent
            last = line if b'"usage":{' in line else last
    saved = json.loads(last.removeprefix(b"data: "))["usage"]["tokencomp"]
    return {
        "ttft": first, "whole": time.perf_counter() - sent, "ratio": saved["requested"]["ratio"],
        "visual": saved["visual_tokens_before"],
    }  # fmt: skip


def burst(url: str, bodies: list[bytes], rate: float, seed: int) -> list[dict[str, float]]:
    """Answers to requests whose arrivals are a Poisson process of `rate` per second."""
    draw, start, at = random.Random(seed), time.perf_counter(), 0.0
    with ThreadPoolExecutor(len(bodies)) as pool:
        waiting = []
        for content in bodies:
            time.sleep(max(0.0, start + at - time.perf_counter()))
            waiting.append(pool.submit(ask, url, content))
            at += draw.expovariate(rate)
        answers = [future.result() for future in waiting]
    return [{**answer, "end": time.perf_counter() - start} for answer in answers]


def until_calm(url: str) -> None:
    """Wait until no step is in force."""
    end = time.monotonic() + CALM
    while time.monotonic() < end:
        with urllib.request.urlopen(f"{url}/metrics") as answer:
            if "\ntokencomp_load_step 0.0" in answer.read().decode():
                return
        time.sleep(0.5)
    raise RuntimeError(f"a step is in force {CALM:.0f} s after the last answer")


def rounds(url: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Records of all rounds and arms. Both bursts of a round come at the same times."""
    for seed in range(3):
        ask(url, body(seed, args, True))
    records, seeds = [], iter(range(3, 10**6))
    for number in range(args.rounds):
        with ThreadPoolExecutor(args.probe) as pool:
            known = [body(next(seeds), args, True) for _ in range(args.probe)]
            start = time.perf_counter()
            list(pool.map(lambda content: ask(url, content), known))
        capacity = args.probe / (time.perf_counter() - start)
        for arm in sorted(ARMS, reverse=number % 2 == 1):
            until_calm(url)
            bodies = [body(next(seeds), args, ARMS[arm]) for _ in range(args.requests)]
            rate = args.overload * capacity
            answers = burst(url, bodies, rate, seed=number)
            busy = os.getloadavg()[0]
            records.append(
                {"round": number, "arm": arm, "rate": rate, "busy": busy, "answers": answers}
            )
            print(publishing.table(COLUMNS, rows_of(records)[-1:]), flush=True)
    return records


def rows_of(records: list[dict[str, Any]]) -> list[list[str]]:
    """Cells of the table; factors compare with the usual ratio in the same round."""
    usual, by_load = ARMS
    rows = []
    for number in sorted({record["round"] for record in records}):
        arms = {r["arm"]: r for r in records if r["round"] == number}
        for arm in (usual, by_load):
            if arm not in arms:
                continue
            answers = arms[arm]["answers"]
            p95 = {name: _times(r, 95) for name, r in arms.items()}
            counts = Counter(a["ratio"] for a in answers)
            factor = f"{p95[usual] / p95[arm]:.2f}" if usual in p95 else ""
            rows.append([
                str(number + 1), arm, f"{arms[arm]['rate']:.2f}", f"{_times(arms[arm], 50):.2f}",
                f"{p95[arm]:.2f}", factor, f"{max(a['end'] for a in answers):.1f}",
                ", ".join(f"{n} at {ratio:g}" for ratio, n in sorted(counts.items())),
            ])  # fmt: skip
    return rows


def _times(record: dict[str, Any], percent: float) -> float:
    return float(np.percentile([a["ttft"] for a in record["answers"]], percent))


def page(records: list[dict[str, Any]]) -> str:
    """The page from the records of one run."""
    setup = records[-1]["setup"]
    busy = [record["busy"] for record in records]
    note = (
        f"{setup['requests']} requests with {setup['visual']} visual tokens each come at "
        f"{setup['overload']:g} times the rate that the server answers at its usual ratio, "
        f"{setup['ratio']:g}, measured right before. The steps are `{setup['steps']}`. Both arms "
        "ask the same server in turns. Time to first token (TTFT) is that of the client; the "
        "factor compares with the usual ratio in the same round. Weights are random, and the "
        "tower is small: where it takes half of the time, a ratio saves less unless `tower_ratio` "
        "is set. What higher ratios cost in answers is on the pages of "
        "[accuracy](../accuracy/README.md). Load average of the machine, with the server, at the "
        f"ends of bursts: {min(busy):.1f} to {max(busy):.1f}. {setup['conditions']}"
    )
    return (
        "# How long does a burst wait, with and without a ratio by load?\n\n"
        + publishing.table(COLUMNS, rows_of(records), right=6)
        + f"\n\n{note}\n\nSetup: {json.dumps(setup)}."
    )


def measure(args: argparse.Namespace) -> Iterator[list[dict[str, Any]]]:
    """Records of all rounds and arms of one server."""
    names = (
        "ratio", "steps", "requests", "probe", "overload", "answer", "images", "side", "conditions",
    )  # fmt: skip
    about = {"vllm": vllm_version(), "hidden": args.hidden, "layers": args.layers}
    about.update({name: getattr(args, name) for name in names})
    os.environ.update(ENV, VLLM_ENABLE_V1_MULTIPROCESSING="1")
    served = ["--engine", "vllm", "--ratio", f"{args.ratio}", "--ratio-by-load", args.steps, "--"]
    served += ["--enforce-eager", "--dtype", "float32", "--max-model-len", "4096"]
    with random_model(args) as (model, work), server(str(model), served, work / "log") as url:
        records = rounds(url, args)
    about["visual"] = records[0]["answers"][0]["visual"]
    yield [{**record, "setup": about} for record in records]


OPTIONS = {
    "rounds": 3,
    "ratio": (0.5, "the usual one"),
    "steps": ("0.75:2304,0.9:4608", "--ratio-by-load"),
    "requests": (24, "of a burst"),
    "probe": (6, "requests that measure the capacity"),
    "overload": (2.0, "rate / rate of the answers"),
    "answer": (8, "tokens of every answer"),
    "images": (4, "of a request"),
    "side": (336, "pixels of an image"),
    "conditions": ("", "a sentence about the machine's other work"),
    **SIZES,
    "layers": 6,
}
EXPERIMENT = Experiment("serving/burst", measure, page, options=OPTIONS, lines=True)


if __name__ == "__main__":
    EXPERIMENT.main(__doc__)
