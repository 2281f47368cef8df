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
from typing import Any

from benchmarks import publishing
from benchmarks.publishing import environment, provenance
from benchmarks.serving.model import SHAPES
from benchmarks.serving.run import parser, random_model, rebuild, run, vllm_version

RATIO = 0.75
CLIENTS = (1, 4, 16, 32)
STOCK = "vLLM"
DROP: dict[str, Any] = {"reducer": "kcenter", "ratio": RATIO, "merge": False}
ARMS: dict[str, Any] = {
    "ratio 0, video": ("video", {"ratio": 0}),
    "evs, video": ("video", {"reducer": "evs", "ratio": RATIO, "merge": False}),
    "ratio 0, image": ("image", {"ratio": 0}),
    "kcenter, image": ("image", DROP),
}
"""Media of a request, and what it asks of the plugin."""
COLUMNS = (
    "media", "engine", "arm", "prompt tokens", "clients", "first token, last client, ms", "×",
    "requests/s", "×",
)  # fmt: skip


def engines() -> dict[str, dict[str, Any]]:
    """Arguments of every engine and its arms."""
    evs = {"video_pruning_rate": RATIO, "video_pruning_method": "evs"}
    merging = {"kcenter merged, image": ("image", {**DROP, "merge": True})}
    return {
        STOCK: {"arms": {"video": ("video", None), "image": ("image", None)}},
        "vLLM EVS": {"engine": evs, "pruning_flag": True, "arms": {"evs, video": ("video", None)}},
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
    setup, facts = records[-1]["setup"], records[-1]["environment"]
    note = (
        "Medians of the rounds. All clients send one request at the same time; factors compare "
        f"with vLLM at the same media and number of clients. Ratio {RATIO:g}. A video has "
        f"{setup['frames']} frames. On a CPU, EVS runs with the runner's flag set (see "
        "[the first token](results.md))."
    )
    return (
        "# Does compression make a server faster or slower under load?\n\n"
        + publishing.table(COLUMNS, rows_of(records), right=6)
        + f"\n\n{note}\n\nSetup: {json.dumps(setup)}. {provenance(facts)}.\n"
    )


def options() -> argparse.ArgumentParser:
    """The command line."""
    result = parser(__doc__ or "", "clients.jsonl", rounds=3)
    result.add_argument("--clients", nargs="+", type=int, default=list(CLIENTS))
    result.add_argument("--answer", type=int, default=16, help="tokens of every answer")
    result.add_argument("--frames", type=int, default=16)
    result.add_argument("--side", type=int, default=224, help="pixels of a frame or an image")
    result.add_argument("--shape", choices=list(SHAPES), help="widths and depths of a real model")
    result.add_argument("--dtype", default="float32")
    result.add_argument("--device", default="cpu", help="where vLLM runs: cpu or cuda")
    return result


def main() -> None:
    args = options().parse_args()
    if args.report:
        rebuild(args.out, page)
        return
    facts = publishing.published_from(args.out, args.allow_dirty)
    shape = {
        name: getattr(args, name)
        for name in ("clients", "answer", "frames", "side", "rounds", "dtype", "device")
    }
    size = {"shape": args.shape} if args.shape else {"hidden": args.hidden, "layers": args.layers}
    about = {"vllm": vllm_version(), **size, **shape}
    records: list[dict[str, Any]] = []
    with random_model(args.hidden, args.layers, args.shape) as (model, work):
        for name, plan in engines().items():
            plan = {"engine": {}, "plugin": False, "pruning_flag": False, **plan}
            for arm, result in run(model, {**plan, **shape}, work, "clients_engine").items():
                measured = result if "failed" in result else {"runs": result}
                media = plan["arms"][arm][0]
                records.append(
                    {"engine": name, "arm": arm, "media": media, **measured, "setup": about}
                )
            print(publishing.table(COLUMNS, rows_of(records)), flush=True)
            source = {"environment": {**environment(), **facts}}
            lines = [json.dumps({**record, **source}) for record in records]
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text("\n".join(lines) + "\n")
    rebuild(args.out, page)


if __name__ == "__main__":
    main()
