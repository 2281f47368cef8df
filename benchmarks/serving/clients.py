"""vLLM under load: how many requests per second, with clients that ask at the same time?

    python -m benchmarks.serving.clients                    # → clients.jsonl, clients.md
    python -m benchmarks.serving.clients --shape 3b --dtype bfloat16 --device cuda
    python -m benchmarks.serving.clients --report           # only rebuilds the page

Engines run one after another: vLLM, vLLM's own EVS, and the plugin without and with `--merge`. All
arms of an engine and all numbers of clients take turns. A client sends one request with a video or
an image that no cache has seen, and all clients of a round send it at once. Weights are random.
Needs vLLM.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator
from typing import Any

from benchmarks import publishing
from benchmarks.experiment import Experiment
from benchmarks.serving.run import PLAN, SHAPES, SIZES, random_model, run, vllm_version

RATIO = 0.75
CLIENTS = (1, 4, 16, 32)
STOCK = "vLLM"
DROP: dict[str, Any] = {"reducer": "kcenter", "ratio": RATIO, "merge": False}


def _arm(kind: str, request: dict[str, Any] | None) -> dict[str, Any]:
    return {"kind": kind, "request": request}


ARMS = {
    "ratio 0, video": _arm("video", {"ratio": 0}),
    "evs, video": _arm("video", {"reducer": "evs", "ratio": RATIO, "merge": False}),
    "ratio 0, image": _arm("image", {"ratio": 0}),
    "kcenter, image": _arm("image", DROP),
}
"""Media of a request, and what it asks of the plugin."""
COLUMNS = (
    "media", "engine", "arm", "prompt tokens", "clients", "first token, last client, ms", "×",
    "requests/s", "×",
)  # fmt: skip


def engines() -> dict[str, dict[str, Any]]:
    """Arguments of every engine and its arms."""
    evs = {"video_pruning_rate": RATIO, "video_pruning_method": "evs"}
    merging = {"kcenter merged, image": _arm("image", {**DROP, "merge": True})}
    return {
        STOCK: {"arms": {kind: _arm(kind, None) for kind in ("video", "image")}},
        "vLLM EVS": {
            "engine": evs,
            "pruning_flag": True,
            "arms": {"evs, video": _arm("video", None)},
        },
        "tokencomp": {"engine": _overrides({}), "plugin": True, "arms": ARMS},
        "tokencomp --merge": {
            "engine": _overrides({"merge": True}),
            "plugin": True,
            "arms": {**merging, "kcenter, image": ARMS["kcenter, image"]},
        },
    }


def _overrides(options: dict[str, Any]) -> dict[str, Any]:
    return {"hf_overrides": {"tokencomp": options}}


def rows_of(records: list[dict[str, Any]]) -> list[list[str]]:
    """Cells of the table; factors compare with vLLM at the same media and number of clients."""
    base: dict[tuple[str, int], tuple[float, float]] = {}
    rows = []
    for record in sorted(records, key=lambda r: (r["media"], r["engine"] != STOCK)):
        head = [record["media"], record["engine"], record["arm"].partition(",")[0]]
        if "failed" in record:
            rows.append([*head, f"does not run: `{record['failed']}`", *[""] * 5])
            continue
        for clients in sorted({r["clients"] for r in record["runs"]}):
            runs = [r for r in record["runs"] if r["clients"] == clients]
            first = statistics.median(r["first"] for r in runs)
            rate = clients / statistics.median(r["all"] for r in runs)
            case = (record["media"], clients)
            if record["engine"] == STOCK:
                base[case] = (first, rate)
            known = base.get(case, (first, rate))
            cells = [str(runs[0]["prompt"]), str(clients), f"{1e3 * first:.0f}"]
            cells += [f"{known[0] / first:.2f}", f"{rate:.2f}", f"{rate / known[1]:.2f}"]
            rows.append([*head, *cells])
    return rows


def page(records: list[dict[str, Any]]) -> str:
    """The page from the records of one run."""
    setup = records[-1]["setup"]
    note = (
        "Medians of the rounds. All clients send one request at the same time; factors compare "
        f"with vLLM at the same media and number of clients. Ratio {RATIO:g}. A video has "
        f"{setup['frames']} frames. On a CPU, EVS runs with the runner's flag set (see "
        "[the first token](results.md))."
    )
    return (
        "# Does compression make a server faster or slower under load?\n\n"
        + publishing.table(COLUMNS, rows_of(records), right=6)
        + f"\n\n{note}\n\nSetup: {json.dumps(setup)}."
    )


def measure(args: argparse.Namespace) -> Iterator[list[dict[str, Any]]]:
    """Records of all engines, one engine after the other."""
    names = ("clients", "answer", "frames", "side", "rounds", "dtype", "device")
    shape = {name: getattr(args, name) for name in names}
    size = {"shape": args.shape} if args.shape else {"hidden": args.hidden, "layers": args.layers}
    about = {"vllm": vllm_version(), **size, **shape}
    cpu = args.device == "cpu"
    limits = {"limit_mm_per_prompt": {"image": 1, "video": 1}, "max_num_seqs": max(args.clients)}
    limits |= {"enforce_eager": cpu, "dtype": args.dtype}
    records: list[dict[str, Any]] = []
    with random_model(args) as (model, work):
        for name, given in engines().items():
            plan = {**PLAN, **given, **shape, "job": "clients"}
            plan |= {"engine": {**limits, **plan["engine"]}}
            plan |= {"pruning_flag": plan["pruning_flag"] and cpu}
            for arm, result in run(model, plan, work).items():
                measured = result if "failed" in result else {"runs": result}
                media = plan["arms"][arm]["kind"]
                about_arm = {"engine": name, "arm": arm, "media": media}
                records.append({**about_arm, **measured, "setup": about})
            print(publishing.table(COLUMNS, rows_of(records)), flush=True)
            yield records


OPTIONS = {
    "rounds": 3,
    "clients": list(CLIENTS),
    "answer": (16, "tokens of every answer"),
    "frames": 16,
    "side": (224, "pixels of a frame or an image"),
    "shape": (None, "widths and depths of a real model", list(SHAPES)),
    "dtype": "float32",
    "device": ("cpu", "where vLLM runs: cpu or cuda"),
    **SIZES,
}
EXPERIMENT = Experiment("serving/clients", measure, page, options=OPTIONS, lines=True)


if __name__ == "__main__":
    EXPERIMENT.main(__doc__)
