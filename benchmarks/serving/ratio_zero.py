"""Cost of the vLLM plugin at ratio 0 against stock vLLM, and how much that measurement varies.

    python -m benchmarks.serving.ratio_zero [--out benchmarks/serving/ratio_zero.jsonl]
    python -m benchmarks.serving.ratio_zero --report    # only rebuilds the page

Engine processes of both arms alternate, and each runs the same requests and nothing else. Two
processes of one arm differ too, so the page has every process: a difference between the arms that
is smaller than the spread of one arm says nothing.
"""

from __future__ import annotations

import json
import statistics
from typing import Any

from benchmarks import publishing
from benchmarks.publishing import environment, provenance
from benchmarks.serving.run import SHAPE, parser, random_model, rebuild, run, vllm_version

ARMS: dict[str, dict[str, Any]] = {
    "stock vLLM": {"plugin": False, "engine": {}, "arms": {"requests": None}},
    "tokencomp, ratio 0": {
        "plugin": True,
        "engine": {"hf_overrides": {"tokencomp": {}}},
        "arms": {"requests": {"ratio": 0}},
    },
}


def page(rows: list[dict[str, Any]]) -> str:
    """The page from the records of one run."""
    lines = ["| arm | process | first token, CPU ms: median | of requests |", "|---|---:|---:|---|"]
    medians: dict[str, list[float]] = {}
    for row in rows:
        own = medians.setdefault(row["arm"], [])
        own.append(1e3 * row["cpu_median_s"])
        cpu = ", ".join(f"{1e3 * value:.0f}" for value in row["cpu"])
        lines.append(f"| {row['arm']} | {len(own)} | {own[-1]:.0f} | {cpu} |")
    text = []
    for arm, values in medians.items():
        middle = statistics.median(values)
        spread = (max(values) - min(values)) / middle
        text.append(f"{arm}: {middle:.0f} ms, spread of the processes {spread:.1%}.")
    stock, ours = medians.values()
    difference = statistics.median(ours) / statistics.median(stock) - 1
    pairs = ", ".join(f"{b / a - 1:+.1%}" for a, b in zip(stock, ours, strict=True))
    text.append(
        f"Difference of the medians: {difference:+.1%}; of neighbouring processes: {pairs}."
    )
    title, _, method = (__doc__ or "").partition("\n\n")
    method = method.split("\n\n", 1)[1].strip()
    setup, facts = rows[-1]["setup"], rows[-1]["environment"]
    return (
        f"# {title}\n\n{' '.join(text)}\n\n{method}\n\n" + "\n".join(lines) + "\n\n"
        f"Setup: {json.dumps(setup)}. {provenance(facts)}.\n"
    )


def main() -> None:
    options = parser(__doc__ or "", "ratio_zero.jsonl", rounds=5)
    options.add_argument("--processes", type=int, default=4, help="of each arm")
    args = options.parse_args()
    if args.report:
        rebuild(args.out, page)
        return
    facts = publishing.published_from(args.out, args.allow_dirty)
    shape = {**SHAPE, "rounds": args.rounds, "requests": 1}
    about = {"vllm": vllm_version(), "hidden": args.hidden, "layers": args.layers, **shape}
    rows: list[dict[str, Any]] = []
    with random_model(args.hidden, args.layers) as (model, work):
        for _ in range(args.processes):
            for arm, plan in ARMS.items():
                result = run(model, {**plan, **shape, "pruning_flag": False}, work)["requests"]
                rows.append({"arm": arm, **result, "setup": about})
                print(arm, result.get("cpu_median_s", result), flush=True)
    source = {"environment": {**environment(), **facts}}
    rows = [{**row, **source} for row in rows]
    args.out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    args.out.with_suffix(".md").write_text(page(rows))


if __name__ == "__main__":
    main()
