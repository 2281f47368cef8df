"""ShapesQA items as examples, in words or in the prompts of multiple-choice benchmarks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokencomp.inputs.questions import Example
from tokencomp.shapesqa.items import Item
from tokencomp.shapesqa.layouts import write_media
from tokencomp.shapesqa.prompt_forms import mlvu_prompt, mvbench_prompt

FORMS = {
    "free": lambda item: item.question,
    "mvbench": lambda item: mvbench_prompt(item.query),
    "mlvu": lambda item: mlvu_prompt(item.query),
}


def shapesqa(items: Iterable[Any], folder: str | Path, form: str = "free") -> list[Example]:
    """ShapesQA items as examples, with their media written as real JPEG and mp4 files.

    Parameters
    ----------
    items
        From `tokencomp.shapesqa.items.items(...)`.
    folder
        Where files go; existing files of an item are used again.
    form
        "free", "mvbench" or "mlvu".
    """
    folder, examples = Path(folder), []
    for item in items:
        path = folder / f"{item.id}{'.jpg' if item.kind == 'image' else '.mp4'}"
        media = item.media or (path if path.exists() else write_media(item, folder).media)
        answer = item.answer if form == "free" else item.letter
        examples.append(Example(item.id, FORMS[form](item), answer, (media,), item.family))
    return examples


def blind_guess(items: Iterable[Item]) -> dict[str, float]:
    """Score per family of a model that sees nothing.

    The guess is the commonest answer, or one of the options at random, whichever scores better.
    """
    groups: dict[str, list[Item]] = {}
    for item in items:
        groups.setdefault(item.family, []).append(item)
    scores = {}
    for name, group in groups.items():
        commonest = max(Counter(item.answer for item in group).values())
        at_random = sum(1 / len(item.options) for item in group)
        scores[name] = max(commonest, at_random) / len(group)
    return scores


def by_family(records: Iterable[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Accuracy and item count per question family."""
    scores: dict[str, dict[str, float]] = {}
    for record in records:
        score = scores.setdefault(record["family"], {"correct": 0, "items": 0})
        score["correct"] += bool(record["correct"])
        score["items"] += 1
    return {k: {**v, "accuracy": v["correct"] / v["items"]} for k, v in scores.items()}
