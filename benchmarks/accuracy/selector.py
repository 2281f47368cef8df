"""Oracle, selector, raw attention row and random choice on held-out ShapesQA.

    tokencomp train selector --model tiny-qwen2-vl --output FOLDER ...
    python benchmarks/accuracy/selector.py

writes selector.json (tables, order, how they were made), selector.jsonl (every answer) and
selector.md. The last set has videos of four times as many frames as the selector was trained on;
`--sets` asks some sets only, the others stay as they are.
"""

from __future__ import annotations

import argparse
import itertools
from typing import Any

from tables import table
from trained import Book, ask, parser

from tokencomp.adapters.base import adapter_for
from tokencomp.cli import one_message
from tokencomp.evaluation.settings import DOWNSCALE
from tokencomp.trained.cards import locate, model_facts
from tokencomp.training.data import ShapesQuestions
from tokencomp.training.relevance import Target
from tokencomp.training.selector.train import RATIOS, oracle_name, ways

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

WHY = """Published order: oracle ≥ selector ≥ raw attention row ≥ random. Here the selector and the
raw row are alike, both above the oracle, all above random. What these answers tell about it: (1)
The raw row leaves no room: the tiny model answers most questions in one hop, from tokens that its
first layer already looks at. (2) What is explained matters. The logit of the answer, the paper's
choice, asks what speaks for the answer; the log-probability also asks what speaks against all other
answers, and with it the oracle is better, on videos level with the selector. (3) What is left are
count questions, and existence questions whose answer is "yes", which turn into "no" ("no" needs no
token and stays). For counts, even half of the tokens by relevance are worse than a random half.
Our reading: only positive contributions to the answer given are kept, and a further object is none
to a count that it is part of already. So the labels are worse than what the selector
reads, and training on them cannot lift it above the raw row; it does not fall below either."""


def by_family(records: list[dict[str, Any]], ratio: float) -> list[dict[str, Any]]:
    """Right answers per question family at one ratio; existence by its answer."""
    labels = {"full": "full@0", **{name: f"{name}@{ratio:g}" for name in SHOWN}}
    groups: dict[str, list[dict[str, Any]]] = {}
    for r in records:
        if r["correct"].keys() >= {*labels.values()}:  # sets of an older run may lack some
            told = f" ({r['answer']})" if r["family"] == "existence" else ""
            groups.setdefault(r["family"] + told, []).append(r)
    return [
        {"family": family, "ratio": ratio, "items": len(group)}
        | {name: sum(r["correct"][label] for r in group) for name, label in labels.items()}
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
    from tokencomp.inputs.loading import load_model

    book = Book("selector", args, RIVALS)
    if book.sets:
        model, processor = load_model(args.model, device=args.device)
        facts = model_facts(adapter_for(model))
        file = locate(args.weights, facts, "selector", "tokencomp train selector")
    for name in book.sets:
        scene = {k: v for k, v in SETS[name].items() if k == "frames"}
        count = args.items // SETS[name]["fewer"]
        source = ShapesQuestions(SETS[name]["families"], count, args.split, **scene)
        asked, batch = ways(file, RATIOS, ORACLES), 8 if scene else args.batch
        measured, asked = ask({"": model}, processor, source, asked, name, batch)
        rows, cards = measured.table(asked), {"selector": file.with_suffix(".json")}
        wrong = {"against_the_published_order": order(rows)}
        book.add(name, rows, measured.records, cards, **wrong)
        book.write(notes(book.records))
    book.write(notes(book.records))


def notes(records: list[dict[str, Any]]) -> str:
    """What the page says besides the tables."""
    columns = ("family", "items", "full", *SHOWN)
    parts = ["## The order", WHY.replace("\n", " ")]
    for ratio in (RATIOS[0], RATIOS[-1]):
        body = [[str(row[c]) for c in columns] for row in by_family(records, ratio)]
        parts += [f"## Right answers per family at ratio {ratio:g}, all sets", table(columns, body)]
    return "\n\n".join(parts)


if __name__ == "__main__":
    with one_message():
        main(parser(__doc__, SETS).parse_args())
