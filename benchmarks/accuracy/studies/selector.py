"""Oracle, selector, raw attention row and random choice on held-out ShapesQA.

    tokencomp train selector --model tiny-qwen2-vl --output FOLDER ...
    python -m benchmarks.accuracy.studies.selector

writes selector.json (tables, provenance, packed answers) and selector.md. The last set has
videos of four times as many frames as the selector was trained on. `--sets` runs some sets only,
the others stay as they are.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from benchmarks.accuracy.studies.oracle import OracleTruth, oracle, oracle_name
from benchmarks.accuracy.studies.trained import Found, Study, measure
from tokencomp.adapters.registry import adapter_for
from tokencomp.evaluation.settings import DOWNSCALE
from tokencomp.inputs.loading import load_model
from tokencomp.reducers.selector import TRAIN
from tokencomp.trained.cards import locate, model_facts
from tokencomp.training.data import ShapesQuestions
from tokencomp.training.relevance import Target
from tokencomp.training.selector.train import RATIOS, comparison

ORACLES: tuple[Target, ...] = ("logit", "logprob")
LOGIT, LOGPROB = (oracle_name(target) for target in ORACLES)
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


def source(name: str, args: argparse.Namespace) -> tuple[ShapesQuestions, int]:
    """The questions of a set, and the size of a batch."""
    scene = {k: v for k, v in SETS[name].items() if k == "frames"}
    count = args.items // SETS[name]["fewer"]
    questions = ShapesQuestions(SETS[name]["families"], count, args.split, **scene)
    return questions, 8 if scene else args.batch


def measured(args: argparse.Namespace) -> Iterator[Found]:
    """The selector, its rivals and both oracles on every set."""
    model, processor = load_model(args.model, device=args.device)
    file = locate(args.weights, model_facts(adapter_for(model)), "selector", TRAIN)
    for name in args.sets:
        questions, batch = source(name, args)
        bounds = [oracle(ratio, target) for ratio in RATIOS for target in ORACLES]
        truth = OracleTruth(model, processor)
        found, methods = measure(
            {"": model}, processor, questions, [*bounds, *comparison(file)], name, batch,
            around=truth,
        )  # fmt: skip
        yield name, found.table(methods), found.runs, {"selector": file.with_suffix(".json")}


STUDY = Study("selector", SETS, measured, RIVALS, WHY)


if __name__ == "__main__":
    STUDY.main(__doc__)
