"""Can one client raise the ratio of others, whose server has a ratio by load?

    python -m benchmarks.serving.attacker                       # → attacker.jsonl, attacker.md
    python -m benchmarks.serving.attacker --engines hf --code FOLDER --steps 0.75:8,0.9:16
    python -m benchmarks.serving.attacker --report              # only rebuilds the page

A server of a tiny model answers three clients, each of which asks about one picture after the
other. One more client attacks: with one-token texts, with bodies that are refused, or with tiny
pictures, at once and again after some seconds. Every client has another address on the loopback
interface (Linux). The page says which ratios the three got. `--code` is another checkout of
tokencomp, whose arms are added to those in the file. Needs the zoo, and vLLM or the extra `serve`.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import statistics
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks import publishing
from benchmarks.experiment import Experiment
from benchmarks.gpu.load import image_part, server
from benchmarks.serving.burst import until_calm
from benchmarks.serving.run import ENV

CLIENTS = tuple(f"127.0.0.{n}" for n in (11, 12, 13))
ATTACKER = "127.0.0.66"
SIDE, SMALL = 224, 28  # pixels of a picture: 64 visual tokens, and 4
ATTACKS = {
    "nobody": (0, ""), "10 one-token texts": (10, "text"), "12 refused bodies": (12, "refused"),
    "40 tiny pictures": (40, "picture"),
}  # fmt: skip
COLUMNS = ("engine", "code", "steps", "attack", "answers by ratio", "median, s")


def body(kind: str, seed: int) -> dict[str, Any]:
    """A request of the attacker, or with `kind` "honest" of another client."""
    content: list[dict[str, Any]] = [{"type": "text", "text": f"What is it? {seed}"}]
    if kind in ("honest", "picture"):
        side = SIDE if kind == "honest" else SMALL
        pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
        content.insert(0, image_part(Image.fromarray(pixels)))
    tokens = {"honest": 8, "refused": 0}.get(kind, 1)  # 0 is refused
    message = {"role": "user", "content": content}
    return {"messages": [message], "max_tokens": tokens, "temperature": 0}


def ask(port: int, client: str, content: dict[str, Any]) -> tuple[int, float, float | None]:
    """Status, milliseconds and ratio of an answer to a request from the address of a client."""
    start = time.perf_counter()
    connection = http.client.HTTPConnection("127.0.0.1", port, 120, source_address=(client, 0))
    with contextlib.closing(connection):
        head = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/chat/completions", json.dumps(content), head)
        answer = connection.getresponse()
        found = json.loads(answer.read())
    saved = (found.get("usage") or {}).get("tokencomp") or {}
    ratio = saved.get("requested", {}).get("ratio")
    return answer.status, round(1000 * (time.perf_counter() - start), 1), ratio


def repeat(work: Callable[[int], Any], first: int, end: float, pause: float) -> list[Any]:
    """Results of `work` with growing numbers until a time."""
    results = []
    while time.monotonic() < end:
        results.append(work(first + len(results)))
        time.sleep(pause)
    return results


def attacked(port: int, attack: str, args: argparse.Namespace, seed: int) -> list[Any]:
    """Answers to the three clients while one more attacks."""
    count, kind = ATTACKS[attack]
    end = time.monotonic() + args.seconds

    def strike(number: int) -> None:
        with ThreadPoolExecutor(count) as pool:
            given = range(seed + count * number, seed + count * (number + 1))
            list(pool.map(lambda n: ask(port, ATTACKER, body(kind, n)), given))

    def honest(i: int) -> list[Any]:
        work = partial(ask, port, CLIENTS[i])
        return repeat(lambda n: work(body("honest", n)), seed + 10**6 * i, end, 0.2)

    with ThreadPoolExecutor(len(CLIENTS) + 1) as pool:
        if count:
            pool.submit(repeat, strike, 1000, end, args.every)
            time.sleep(0.2)
        return [answer for some in pool.map(honest, range(len(CLIENTS))) for answer in some]


def answers_of(engine: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Records of all attacks on one server."""
    served = ["--engine", engine, "--ratio", "0.5", "--ratio-by-load", args.steps]
    if engine == "vllm":
        served += ["--", "--enforce-eager", "--dtype", "float32", "--max-model-len", "2048"]
    records = []
    with (
        tempfile.TemporaryDirectory() as work,
        server("tiny-qwen2-vl", served, Path(work) / "log") as url,
    ):
        port = int(url.rpartition(":")[2])
        ask(port, CLIENTS[0], body("honest", 0))
        for number, attack in enumerate(ATTACKS):
            until_calm(url)
            answers = attacked(port, attack, args, 10**7 * (number + 1))
            records.append({"engine": engine, "attack": attack, "answers": answers})
            print(engine, attack, Counter(ratio for _, _, ratio in answers), flush=True)
    return records


def rows_of(records: list[dict[str, Any]]) -> list[list[str]]:
    """Cells of the table."""
    rows = []
    for r in records:
        counts = Counter(ratio for status, _, ratio in r["answers"] if status == 200)
        shown = ", ".join(f"{n} at {ratio:g}" for ratio, n in sorted(counts.items()))
        middle = statistics.median(ms for _, ms, _ in r["answers"]) / 1000
        setup = r["setup"]
        rows.append(
            [r["engine"], setup["code"][:8], f"`{setup['steps']}`", r["attack"], shown,
             f"{middle:.2f}"]
        )  # fmt: skip
    return rows


def page(records: list[dict[str, Any]]) -> str:
    """The page from the records."""
    setup = records[-1]["setup"]
    note = (
        "Three clients ask tiny-qwen2-vl about one picture of 64 visual tokens after the other "
        f"for {setup['seconds']:g} s; the attacker sends all of its requests at once, and again "
        f"{setup['every']:g} s after they have ended. The ratio without load is 0.5. Steps of "
        "984696b0 are numbers of unanswered requests, those of later commits unanswered visual "
        f"tokens: 8 and 16 of these pictures. {setup['conditions']}"
    )
    return (
        "# Can one client raise the ratio of others?\n\n"
        + publishing.table(COLUMNS, rows_of(records), right=1)
        + f"\n\n{note}"
    )


def measure(args: argparse.Namespace) -> Iterator[list[dict[str, Any]]]:
    """Records of servers with the code of a checkout, after those that are stored."""
    records = publishing.read_lines(args.out) if args.out.exists() else []
    code = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=args.code, capture_output=True, text=True, check=True
    ).stdout.strip()
    path = os.pathsep.join([str(args.code), str(args.code / "zoo")])
    os.environ.update(ENV, VLLM_ENABLE_V1_MULTIPROCESSING="1", OMP_NUM_THREADS="1")
    os.environ.update(PYTHONPATH=path, PYTHONSAFEPATH="1")
    setup = {name: getattr(args, name) for name in ("steps", "seconds", "every", "conditions")}
    setup["code"] = code
    for engine in args.engines:
        records += [{**record, "setup": setup} for record in answers_of(engine, args)]
        yield records


OPTIONS = {
    "engines": ["hf", "vllm"],
    "code": (Path(__file__).resolve().parents[2], "a checkout of tokencomp"),
    "steps": ("0.75:512,0.9:1024", "--ratio-by-load"),
    "seconds": (30.0, "of an attack"),
    "every": (8.0, "seconds between attacks"),
    "conditions": ("", "a sentence about the machine's other work"),
}
EXPERIMENT = Experiment("serving/attacker", measure, page, options=OPTIONS, lines=True)


if __name__ == "__main__":
    EXPERIMENT.main(__doc__)
