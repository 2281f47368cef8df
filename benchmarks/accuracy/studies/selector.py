"""Oracle, selector, raw attention row and random choice on held-out ShapesQA.

    tokencomp train selector --model tiny-qwen2-vl --output FOLDER ...
    python -m benchmarks.accuracy.studies.selector

writes selector.json (tables, order, provenance, packed answers) and selector.md. The last set has
videos of four times as many frames as the selector was trained on. `--sets` runs some sets only,
the others stay as they are.
"""

from __future__ import annotations

import argparse
import itertools
from typing import Any

from benchmarks.accuracy.studies.oracle import OracleTruth, oracle, oracle_name
from benchmarks.accuracy.studies.trained import StudyTables, measure, parser
from tokencomp.adapters.registry import adapter_for
from tokencomp.cli import one_message
from tokencomp.evaluation.settings import DOWNSCALE
from tokencomp.inputs.loading import load_model
from tokencomp.trained.cards import locate, model_facts
from tokencomp.training.data import ShapesQuestions
from tokencomp.training.relevance import Target
from tokencomp.training.selector.train import RATIOS, comparison

ORACLES: tuple[Target, ...] = ("logit", "logprob")
LOGIT, LOGPROB = (oracle_name(target) for target in ORACLES)
ORDER = (LOGIT, "selector", "attention", "random")  # the paper explains logits
RIVALS = {
    "selector": ("attention", LOGIT, LOGPROB, "random", "uniform", DOWNSCALE),
    LOGPROB: (LOGIT, "attention"),
}
SETS: dict[str, dict[str, Any]] = {
    "image": {"families": ("attribute", "small_object", "existence", "count"), "fewer": 1},
    "video": {"families": ("needle",), "fewer": 2},
    "video, 4× the tokens": {"families": ("needle",), "fewer": 4, "frames": 32},
}

WHY = """The published order is oracle ≥ selector ≥ raw attention ≥ random. Here selector and raw
attention are equal and above the oracle; all are above random. The tiny model answers most
questions from tokens that its first layer already attends to, so training has little to add. The
labels that explain the log-probability of the answer (logprob) are better than those of the paper
(logit). The losses are in counting and in existence questions whose answer is "yes"."""


def order(rows: list[dict[str, Any]]) -> dict[str, list[str]]:
    """Per ratio, the pairs of the published order that do not hold."""
    wrong: dict[str, list[str]] = {}
    for ratio in RATIOS:
        score = {r["name"]: r["accuracy"] for r in rows if r["ratio"] == ratio}
        pairs = itertools.pairwise(ORDER)
        wrong[f"{ratio:g}"] = [f"{a} < {b}" for a, b in pairs if score[a] < score[b]]
    return wrong


def main(args: argparse.Namespace) -> None:
    study = StudyTables("selector", args, RIVALS)
    if study.sets:
        model, processor = load_model(args.model, device=args.device)
        file = locate(
            args.weights, model_facts(adapter_for(model)), "selector", "tokencomp train selector"
        )
    for name in study.sets:
        scene = {k: v for k, v in SETS[name].items() if k == "frames"}
        count = args.items // SETS[name]["fewer"]
        source = ShapesQuestions(SETS[name]["families"], count, args.split, **scene)
        methods, batch = comparison(file), 8 if scene else args.batch
        bounds = [oracle(ratio, target) for ratio in RATIOS for target in ORACLES]
        measured, methods = measure(
            {"": model}, processor, source, [*bounds, *methods], name, batch,
            around=OracleTruth(model, processor),
        )  # fmt: skip
        rows, cards = measured.table(methods), {"selector": file.with_suffix(".json")}
        wrong = {"against_the_published_order": order(rows)}
        study.add(name, rows, measured.runs, cards, **wrong)
        study.write(WHY)
    study.write(WHY)


if __name__ == "__main__":
    with one_message():
        main(parser(__doc__, SETS).parse_args())
