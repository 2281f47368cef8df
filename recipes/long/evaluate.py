"""Facts that a model gets right in its long answers, by family.

python -m recipes.long.evaluate FOLDER --split validation --items 16
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from tokencomp.cli import one_message
from tokencomp.evaluation.runner import evaluate
from tokencomp.inputs.loading import load_folder
from tokencomp.zoo.shapesqa.examples import long_examples
from tokencomp.zoo.shapesqa.facts import compare, read
from tokencomp.zoo.shapesqa.long_scenes import FAMILIES, LongItem, item

LONGEST = 224
"""Tokens of an answer; the longest of a reference has about 200."""


def answers(model: Any, processor: Any, items: Sequence[LongItem], batch: int) -> dict[str, str]:
    """The answers of the full model by id, greedy."""
    run = evaluate(
        model,
        processor,
        long_examples(items),
        batch_size=batch,
        max_new_tokens=LONGEST,
        progress=False,
    )
    return {record["id"]: record["prediction"] for record in run.answered}


def scores(items: Sequence[LongItem], said: dict[str, str]) -> dict[str, dict[str, float]]:
    """By family: share of facts kept, invented facts for each of them, and the numbers of both."""
    out = {}
    for family in dict.fromkeys(one.family for one in items):
        group = [one for one in items if one.family == family]
        found = [compare(family, one.facts, read(family, said[one.id])) for one in group]
        facts = sum(len(one.facts) for one in group)
        out[family] = {
            "right": sum(sum(one.kept) for one in found) / facts,
            "invented": sum(one.invented for one in found) / facts,
            "facts": facts,
            "items": len(group),
        }
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--split", default="validation")
    parser.add_argument("--items", type=int, default=16, help="per family")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--show", type=int, default=0, help="answers to print, per family")
    args = parser.parse_args()
    items = [item(args.split, family, k) for family in FAMILIES for k in range(args.items)]
    model, processor = load_folder(args.folder)
    said = answers(model, processor, items, args.batch)
    for family, score in scores(items, said).items():
        print(family, {name: round(value, 3) for name, value in score.items()}, flush=True)
        for one in [one for one in items if one.family == family][: args.show]:
            print("  is  ", one.answer.replace("\n", " "))
            print("  said", said[one.id].replace("\n", " "))


if __name__ == "__main__":
    with one_message():
        main()
