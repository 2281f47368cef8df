"""Bytes that an encoder, a prefill and a decode in different processes hand to each other.

    python -m benchmarks.serving.transfer             # → transfer.json, transfer.md
    python -m benchmarks.serving.transfer --report    # only rebuilds the page

One engine with vLLM's example connectors (`ECExampleConnector`, `ExampleConnector`) reads an image
at every ratio, and the files that it writes are what crosses the network: rows of the vision tower
for a prefill, blocks of the KV cache for a decode. The model is a random Qwen2.5-VL in float32. The
second table has the sizes of published models in 16 bits, by the formulas that give the measured
bytes: width + 6 numbers per token, and 2 · layers · key-value heads · head size.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import publishing
from benchmarks.experiment import Experiment, Rows
from benchmarks.serving.run import PLAN, SIZES, random_model, run, vllm_version

RATIOS = (0.0, 0.5, 0.75, 0.9)
BLOCK = 32  # tokens of a block of the KV cache
IMAGES = (1, 4, 16, 64)
GBITS = (10, 25, 100)
TOKENS = 1024  # of an image of 896 × 896 pixels
OFFSETS = 6  # columns of a row for its position
CONFIGS = {  # width, layers, key-value heads and their dimensions, of the configs of Qwen2.5-VL
    "7B": (3584, 28, 4, 128),
    "72B": (8192, 80, 8, 128),
}


def plan(merge: bool, work: Path) -> dict[str, Any]:
    """What an engine runs that both encodes for others and hands on its cache."""
    folders = {"features": str(work / f"ec{merge}"), "blocks": str(work / f"kv{merge}")}
    storing = [{"shared_storage_path": folder} for folder in folders.values()]
    engine = {
        "block_size": BLOCK, "limit_mm_per_prompt": {"image": 1, "video": 0},
        "hf_overrides": {"tokencomp": {"merge": merge}},
        "ec_transfer_config": {
            "ec_connector": "ECExampleConnector", "ec_role": "ec_both",
            "ec_connector_extra_config": storing[0],
        },
        "kv_transfer_config": {
            "kv_connector": "ExampleConnector", "kv_role": "kv_both",
            "kv_connector_extra_config": storing[1],
        },
    }  # fmt: skip
    arms = {
        str(ratio): {"request": {"ratio": ratio, "reducer": "kcenter"}, "kind": "image"}
        for ratio in RATIOS
    }
    return {**PLAN, "engine": engine, "plugin": True, "job": "files", "arms": arms,
            "folders": folders, "frames": 1, "rounds": 1}  # fmt: skip


def measure(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Bytes of every side, merging and ratio."""
    sizes: Rows = []
    with random_model(args) as (model, work):
        for merge, side in itertools.product((False, True), args.sides):
            where = work / str(side)
            for ratio, found in run(model, {**plan(merge, where), "side": side}, work).items():
                if "failed" in found:
                    raise SystemExit(f"an engine failed: {found['failed']}")
                sizes.append({"merge": merge, "side": side, "ratio": float(ratio), **found})
    yield {"sizes": sizes, "vllm": vllm_version(), "hidden": args.hidden, "layers": args.layers}


def calculated() -> Rows:
    """Megabytes and milliseconds of every model, number of images and ratio."""
    rows = []
    for (model, sizes), images, ratio in itertools.product(CONFIGS.items(), IMAGES, RATIOS):
        width, layers, heads, dim = sizes
        kept = images * int(TOKENS * (1 - ratio) + 0.5)
        features = 2 * kept * (width + OFFSETS)
        blocks = 2 * kept * 2 * layers * heads * dim
        row = {"model": model, "images": images, "ratio": ratio, "visual tokens": kept,
               "features MB": features / 1e6, "blocks MB": blocks / 1e6}  # fmt: skip
        for name, size in (("features", features), ("blocks", blocks)):
            row |= {f"{name} ms at {g} Gbit/s": 8e3 * size / (g * 1e9) for g in GBITS}
        rows.append(row)
    return rows


def page(stored: dict[str, Any]) -> str:
    """The measured sizes, and what follows for published models."""
    whole: dict[tuple[int, bool], dict[str, Any]] = {}
    lines, paper = [], []
    for row in stored["sizes"]:
        first = whole.setdefault((row["side"], row["merge"]), row)
        cells = [f"{row['side']} × {row['side']}", "on" if row["merge"] else "off"]
        cells += [f"{row['ratio']:g}", f"{row['prompt']}"]
        for name in ("features", "blocks"):
            cells += [f"{row[name]:,}", f"{row[name] / first[name]:.1%}"]
        lines.append(cells)
    for row in calculated():
        times = [row[f"blocks ms at {g} Gbit/s"] for g in GBITS]
        sizes = [f"{row[f'{name} MB']:,.1f}" for name in ("features", "blocks")]
        sizes += [f"{x:,.0f}" if x >= 10 else f"{x:.1f}" for x in times]
        paper.append([row["model"], f"{row['images']}", f"{row['ratio']:g}", *sizes])
    head = ("image", "merging", "ratio", "prompt", "features, bytes", "", "blocks, bytes", "")
    measured = publishing.table(head, lines, right=6).replace("|  |", "| |")
    columns = ["model", "images", "ratio", "features, MB", "blocks, MB"]
    columns += [f"blocks, ms at {g} Gbit/s" for g in GBITS]
    shares = {
        model: 2 * layers * heads * dim / (width + OFFSETS)
        for model, (width, layers, heads, dim) in CONFIGS.items()
    }
    method = (__doc__ or "").split("\n\n", 2)[2].strip()
    return "\n".join([
        "# How many bytes cross the network between encoder, prefill and decode?", "",
        "Features shrink with the number of kept tokens: rows have the columns of their position "
        "(and of their size, where the engine merges) at ratio 0 too. The KV cache shrinks by "
        "whole blocks of tokens; `ExampleConnector` leaves the last, unfilled one out, and the "
        "text of a prompt does not shrink.", "", method,
        "", measured, "",
        f"Setup: width {stored['hidden']}, {stored['layers']} layers, blocks of {BLOCK} tokens, "
        f"{stored['vllm']}. Percentages are of ratio 0 of the same engine. Files have a header of "
        "about a hundred bytes.", "",
        "## Published models, by calculation", "",
        f"Images of {TOKENS:,} visual tokens in 16 bits, without text; a link that is used fully. "
        "Times of features are in the CSV file. **No transfer between machines was measured.**",
        "", publishing.table(columns, paper, right=7), "",
        "A visual token has " + " and ".join(f"{n:.0f} times ({m})" for m, n in shares.items())
        + " as many bytes in the KV cache as in the features, at every ratio: the link between "
        "prefill and decode is the narrow one. Both transfers and the linear part of the prefill "
        "shrink by the same factor, so that compression does not move the bottleneck between "
        "them. The vision tower (without `tower_ratio`) and the weights that decode steps read "
        "stay as they are, and get a larger share of the time.",
    ])  # fmt: skip


OPTIONS = {"sides": ([224, 448], "pixels"), **SIZES, "hidden": 512, "layers": 8}
EXPERIMENT = Experiment(
    "serving/transfer", measure, page, rows=lambda _: calculated(), options=OPTIONS
)


if __name__ == "__main__":
    EXPERIMENT.main(__doc__)
