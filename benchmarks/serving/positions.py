"""What renumbering kept tokens costs: positions "original" against "compact", paired, on ShapesQA.

    python -m benchmarks.serving.positions [--model tiny-llava-onevision]
    python -m benchmarks.serving.positions --report    # only rebuilds the page

Serving engines with one position per token number kept tokens without gaps; the Hugging Face path
can do both. Every question is answered with both, so the differences are paired.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import tempfile
from collections.abc import Iterator
from typing import Any

import tokencomp
from benchmarks import publishing
from benchmarks.experiment import Experiment
from tokencomp.evaluation.metrics import mcnemar
from tokencomp.inputs.prompts import build_inputs, generate
from tokencomp.zoo import load
from tokencomp.zoo.shapesqa.examples import shapesqa
from tokencomp.zoo.shapesqa.items import items

POSITIONS = ("original", "compact")
INTRO = """Accuracy with the original positions of the kept tokens, and with compact positions. The
latter number the kept tokens without gaps, as serving engines with one position per token do. p is
an exact McNemar test on the same questions. [All benchmark pages](../README.md)."""


def correct(model: Any, processor: Any, examples: list[Any], batch: int) -> list[int]:
    """1 or 0 per example, in order."""
    scores: list[int] = []
    for start in range(0, len(examples), batch):
        rows = examples[start : start + batch]
        inputs = build_inputs(processor, [e.load(8) for e in rows], [e.prompt for e in rows])
        texts = generate(model, processor, inputs, max_new_tokens=16)
        scores += [int(e.correct(text)) for e, text in zip(rows, texts, strict=True)]
    return scores


def page(report: dict[str, Any]) -> str:
    """Markdown."""
    head = ("reducer", "ratio", *POSITIONS, *(f"only {how} right" for how in POSITIONS), "p")
    rows = []
    for row in report["rows"]:
        both, test = [f"{row[f'accuracy_{how}']:.3f}" for how in POSITIONS], row["mcnemar"]
        paired = [str(test["wins"]), str(test["losses"]), f"{test['p']:.2g}"]
        rows.append([row["reducer"], str(row["ratio"]), *both, *paired])
    full = f"uncompressed {report['accuracy_full']:.3f}"
    about = f"{report['model']}, {report['items']} items, {full}"
    listed = publishing.table(head, rows, right=len(head) - 1)
    title = "# What does renumbering kept tokens cost in accuracy?"
    return f"{title}\n\n{listed}\n\n{INTRO}\n\n{about}."


def measure(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Every reducer and ratio under both kinds of positions."""
    model, processor = load(args.model)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as media:
        examples = shapesqa(items("test", args.per_family), media)
        full = correct(model, processor, examples, args.batch)
        for reducer, ratio in itertools.product(args.reducers, args.ratios):
            scores = {}
            for how in POSITIONS:
                with tokencomp.patch(model, ratio, reducer=reducer, positions=how):
                    scores[how] = correct(model, processor, examples, args.batch)
            row = {f"accuracy_{k}": sum(v) / len(v) for k, v in scores.items()}
            test = dataclasses.asdict(mcnemar(scores["original"], scores["compact"]))
            rows.append({"reducer": reducer, "ratio": ratio, **row, "mcnemar": test})
            print(rows[-1], flush=True)
    accuracy = sum(full) / len(full)
    about = {"model": args.model, "items": len(examples), "accuracy_full": accuracy}
    yield {**about, "rows": rows}


OPTIONS = {
    "model": "tiny-llava-onevision",
    "reducers": ["divprune", "uniform"],
    "ratios": [0.5, 0.75, 0.9],
    "per_family": 20,
    "batch": 16,
}
EXPERIMENT = Experiment("serving/positions", measure, page, options=OPTIONS)


if __name__ == "__main__":
    EXPERIMENT.main(__doc__)
