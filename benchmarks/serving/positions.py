"""What renumbering kept tokens costs: positions "original" against "compact", paired, on ShapesQA.

    python benchmarks/serving/positions.py [--model tiny-llava-onevision]

Engines with one position per token number kept tokens without gaps; the Hugging Face path can do
both. Every item is asked under both, so the differences are paired.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

import tokencomp
from tokencomp.evaluation.environment import environment, provenance
from tokencomp.evaluation.metrics import mcnemar
from tokencomp.inputs.prompts import build_inputs, generate
from tokencomp.inputs.questions import shapesqa
from tokencomp.shapesqa.items import items
from tokencomp.zoo import load

HERE = Path(__file__).parent
POSITIONS = ("original", "compact")


def correct(model: Any, processor: Any, examples: list[Any], batch: int) -> list[int]:
    """1 or 0 per example, in order."""
    found: list[int] = []
    for start in range(0, len(examples), batch):
        rows = examples[start : start + batch]
        inputs = build_inputs(processor, [e.load(8) for e in rows], [e.prompt for e in rows])
        told = generate(model, processor, inputs, max_new_tokens=16)
        found += [int(e.correct(text)) for e, text in zip(rows, told, strict=True)]
    return found


def table(report: dict[str, Any]) -> str:
    """Markdown."""
    columns = (
        "| reducer | ratio | original | compact | original alone right | compact alone right | p |"
    )
    lines = [columns, "|---|---:|---:|---:|---:|---:|---:|"]
    for row in report["rows"]:
        both = " | ".join(f"{row[f'accuracy_{how}']:.3f}" for how in POSITIONS)
        test = row["mcnemar"]
        paired = f"{test['wins']} | {test['losses']} | {test['p']:.2g}"
        lines.append(f"| {row['reducer']} | {row['ratio']} | {both} | {paired} |")
    head = f"{report['model']}, {report['items']} items, uncompressed {report['accuracy_full']:.3f}"
    made = provenance(report["environment"])
    return f"# Positions of kept tokens\n\n{head}. {made}.\n\n" + "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny-llava-onevision")
    parser.add_argument("--reducers", nargs="+", default=["divprune", "uniform"])
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.5, 0.75, 0.9])
    parser.add_argument("--per-family", type=int, default=20)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--out", type=Path, default=HERE / "positions.json")
    given = parser.parse_args()
    model, processor = load(given.model)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as media:
        examples = shapesqa(items("test", given.per_family), media)
        full = correct(model, processor, examples, given.batch)
        for reducer in given.reducers:
            for ratio in given.ratios:
                scores = {}
                for how in POSITIONS:
                    with tokencomp.patch(model, ratio, reducer=reducer, positions=how):
                        scores[how] = correct(model, processor, examples, given.batch)
                row = {f"accuracy_{k}": sum(v) / len(v) for k, v in scores.items()}
                test = mcnemar(scores["original"], scores["compact"])
                rows.append(
                    {"reducer": reducer, "ratio": ratio, **row, "mcnemar": dataclasses.asdict(test)}
                )
                print(rows[-1], flush=True)
    report = {
        "environment": environment(), "model": given.model, "items": len(examples),
        "accuracy_full": sum(full) / len(full), "rows": rows,
    }  # fmt: skip
    given.out.write_text(json.dumps(report, indent=1) + "\n")
    given.out.with_suffix(".md").write_text(table(report))


if __name__ == "__main__":
    main()
