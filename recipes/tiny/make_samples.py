"""``python -m recipes.tiny.make_samples``: the sample files that ship with the package.

Three images and two videos of the test split, each with two questions, so that a demo has real
files to read right after installation.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from tokencomp.zoo import SAMPLES
from tokencomp.zoo.shapesqa.items import Item, item, stream
from tokencomp.zoo.shapesqa.layouts import record, write_media
from tokencomp.zoo.shapesqa.questions import ask

# (family of the scene, index, second question family of the same scene)
CHOSEN = (
    ("attribute", 1, "existence"),
    ("small_object", 2, "count"),
    ("position", 3, "attribute"),
    ("needle", 1, "video_existence"),
    ("direction", 2, "order"),
)


def second_question(one: Item, family: str) -> Item | None:
    """The same scene with a question of another family, if it allows one."""
    for attempt in range(50):
        question = ask(one.scene, family, stream("test", one.id, family, attempt))
        if question is not None and question.text != one.question:
            return replace(one, id=f"{one.id}-{family}", query=question)
    return None


def main(folder: Path = SAMPLES) -> None:
    """Write the media files and ``questions.json`` into ``folder``."""
    rows = []
    for family, index, other in CHOSEN:
        one = write_media(item("test", family, index), folder)
        rows.append(record(one, folder))
        extra = second_question(one, other)
        if extra is not None:
            rows.append(record(extra, folder))
    (folder / "questions.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
