"""Accuracy of a tiny model on ShapesQA, through real files, its processor and `generate`."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from typing import Any

from tokencomp.errors import MediaError
from tokencomp.evaluation.runner import evaluate as evaluate_setting
from tokencomp.shapesqa.examples import shapesqa
from tokencomp.shapesqa.items import FRAMES, Item


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
