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
from collections.abc import Iterable
from typing import Any

from benchmarks.accuracy.packed import PackedAnswers
from benchmarks.accuracy.studies.oracle import OracleTruth, oracle, oracle_name
from benchmarks.accuracy.studies.trained import REFERENCE, StudyTables, measure, parser
from benchmarks.accuracy.tables import table
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
SHOWN = (LOGIT, LOGPROB, *ORDER[1:])
SETS: dict[str, dict[str, Any]] = {
    "image": {"families": ("attribute", "small_object", "existence", "count"), "fewer": 1},
    "video": {"families": ("needle",), "fewer": 2},
    "video, 4× the tokens": {"families": ("needle",), "fewer": 4, "frames": 32},
}

WHY = """The published order is oracle ≥ selector ≥ raw attention row ≥ random. Here the selector
and the raw row are equal, both are above the oracle, and all are above random. The answers suggest
three reasons. (1) The raw row leaves no room for improvement: the tiny model answers most questions
in one hop, from tokens that its first layer already attends to. (2) The target of the explanation
matters. The paper explains the logit of the answer, that is, what speaks for it; the
log-probability also explains what speaks against all other answers. With it the oracle is better,
and on videos equal to the selector. (3) The remaining losses are count questions, and existence
questions whose answer is "yes", which turn into "no" ("no" needs no token and stays correct). For
counts, half of the tokens chosen by relevance are worse than a random half. Our interpretation is
that only positive contributions to the given answer are kept, and one more object contributes
nothing to a count that already includes it. So the labels are worse than what the selector reads,
and training on them cannot lift it above the raw row, though it does not fall below it either."""


def by_family(sets: Iterable[PackedAnswers], ratio: float) -> list[dict[str, Any]]:
    """Correct answers per question family at one ratio; existence by its answer."""
    labels = {"full": REFERENCE, **{name: f"{name}@{ratio:g}" for name in SHOWN}}
    groups: dict[str, list[dict[str, int]]] = {}
    for one in sets:
        if not one.correct.keys() >= {*labels.values()}:  # sets of an older run may lack some
            continue
        questions = zip(one.questions.families, one.questions.answers, strict=True)
        for i, (family, answer) in enumerate(questions):
            group = f"{family} ({answer})" if family == "existence" else family
            scores = {name: one.correct[label][i] for name, label in labels.items()}
            groups.setdefault(group, []).append(scores)
    return [
        {"family": family, "ratio": ratio, "items": len(group)}
        | {name: sum(scores[name] for scores in group) for name in labels}
        for family, group in sorted(groups.items())
    ]


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
        study.write(notes(study.answers.values()))
    study.write(notes(study.answers.values()))


def notes(sets: Iterable[PackedAnswers]) -> str:
    """The parts of the page below the tables."""
    columns, every = ("family", "items", "full", *SHOWN), list(sets)
    parts = ["## The order", WHY.replace("\n", " ")]
    for ratio in (RATIOS[0], RATIOS[-1]):
        body = [[str(row[c]) for c in columns] for row in by_family(every, ratio)]
        title = f"## Correct answers per family at ratio {ratio:g}, all sets"
        parts += [title, table(columns, body)]
    return "\n\n".join(parts)


if __name__ == "__main__":
    with one_message():
        main(parser(__doc__, SETS).parse_args())
