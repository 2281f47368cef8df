"""ShapesQA items as examples, in words or in the prompts of multiple-choice benchmarks."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokencomp.inputs.questions import Deferred, Example
from tokencomp.zoo.shapesqa.layouts import write_media
from tokencomp.zoo.shapesqa.long_scenes import LongItem
from tokencomp.zoo.shapesqa.prompt_forms import mlvu_prompt, mvbench_prompt

FORMS = {
    "free": lambda item: item.question,
    "mvbench": lambda item: mvbench_prompt(item.query),
    "mlvu": lambda item: mlvu_prompt(item.query),
}


def shapesqa(items: Iterable[Any], folder: str | Path, form: str = "free") -> list[Example]:
    """ShapesQA items as examples, with their media written as real JPEG and mp4 files.

    Existing files of an item in `folder` are used again. `form` is one of `FORMS`.
    """
    folder, examples = Path(folder), []
    for item in items:
        path = folder / f"{item.id}{'.jpg' if item.kind == 'image' else '.mp4'}"
        media = item.media or (path if path.exists() else write_media(item, folder).media)
        answer = item.answer if form == "free" else item.letter
        examples.append(Example(item.id, FORMS[form](item), answer, (media,), item.family))
    return examples


def long_examples(items: Iterable[LongItem]) -> list[Example]:
    """Items with long answers as examples; their pixels are drawn when they are loaded."""
    return [
        Deferred(item.id, item.question, item.answer, (), item.family, source=item.media)
        for item in items
    ]
