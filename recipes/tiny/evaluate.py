"""Accuracy of a tiny model on ShapesQA, through real files, its processor and `generate`."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterable
from typing import Any

from tokencomp.errors import MediaError
from tokencomp.evaluation.runner import evaluate as evaluate_setting
from tokencomp.zoo.shapesqa.examples import shapesqa
from tokencomp.zoo.shapesqa.items import FRAMES, Item


def evaluate(
    model: Any,
    processor: Any,
    items: Iterable[Item],
    form: str = "free",
    frames: int = FRAMES,
    batch: int = 16,
) -> list[dict[str, Any]]:
    """Ask every item once. Images go through JPEG files, videos through mp4 files.

    Returns
    -------
    list of dict
        `id`, `family`, `prediction`, `answer`, `correct` and costs per item.

    Raises
    ------
    MediaError
        A file cannot be read.
    """
    with tempfile.TemporaryDirectory() as folder:
        run = evaluate_setting(
            model,
            processor,
            shapesqa(items, folder, form),
            batch_size=batch,
            frames=frames,
            max_new_tokens=8,
            progress=f"answering ({form})",
        )
    if run.failed:
        raise MediaError(f"{run.failed[0]['id']}: {run.failed[0]['error']}")
    return run.records


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
