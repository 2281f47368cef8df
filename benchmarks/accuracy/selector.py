"""Oracle, selector, raw attention row and random choice on held-out ShapesQA.

    tokencomp train selector --model tiny-qwen2-vl --output FOLDER ...
    python benchmarks/accuracy/selector.py

writes selector.json (tables, order, versions) and selector.jsonl (every answer). `--longer` asks
about videos of four times as many frames as the selector was trained on.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import Any

from trained import parser, publish

from tokencomp.training.data import ShapesQuestions
from tokencomp.training.measure import Measurement
from tokencomp.training.selector import RATIOS, ways

ORDER = ("oracle", "selector", "attention", "random")
SETS: dict[str, dict[str, Any]] = {
    "image": {"families": ("attribute", "small_object", "existence"), "fewer": 1},
    "video": {"families": ("needle",), "fewer": 2},
    "video, 4× the tokens": {"families": ("needle",), "fewer": 4, "frames": 32},
}


def order(rows: list[dict[str, Any]]) -> dict[str, list[str]]:
    """Per ratio, the pairs of the published order that do not hold."""
    wrong: dict[str, list[str]] = {}
    for ratio in RATIOS:
        score = {r["name"]: r["accuracy"] for r in rows if r["ratio"] == ratio}
        pairs = itertools.pairwise(ORDER)
        wrong[f"{ratio:g}"] = [f"{a} < {b}" for a, b in pairs if score[a] < score[b]]
    return wrong


def main(args: argparse.Namespace) -> None:
    from tokencomp.evaluation.loading import load_model

    model, processor = load_model(args.model, device=args.device)
    weights = Path(args.weights or Path(model.config._name_or_path) / "tokencomp")
    tables: dict[str, Any] = {}
    records = []
    asked = ways(weights, RATIOS, oracle=True)
    for name, settings in SETS.items():
        scene = {k: v for k, v in settings.items() if k == "frames"}
        count = args.items // settings["fewer"]
        source = ShapesQuestions(settings["families"], count, args.split, **scene)
        measured = Measurement({"": model}, processor, batch=8 if scene else args.batch)
        measured.run(source, asked, name)
        rows = measured.table(asked)
        tables[name] = {"rows": rows, "against_the_published_order": order(rows)}
        records += [{"set": name, **r} for r in measured.records]
        publish("selector", args, tables, records, weights / "selector.json")


if __name__ == "__main__":
    main(parser(__doc__).parse_args())
