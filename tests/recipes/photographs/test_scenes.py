"""Questions about composed photographs: answers, words, splits, and where pictures come from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.photographs import COLORS, Drawings

from recipes.photographs.clip_questions import clip_items, write_questions
from recipes.photographs.items import items
from recipes.photographs.questions import COUNTS, FAMILIES
from recipes.photographs.scenes import SIZE, render
from tokencomp.inputs.files import FileQuestions
from tokencomp.inputs.media import load_media


def boxes(pixels: np.ndarray) -> dict[str, tuple[float, float, float]]:
    """Center x, center y and area of every thing, from the pixels of its colour alone."""
    found = {}
    for name, color in COLORS.items():
        y, x = np.nonzero((pixels == color).all(-1))
        if len(x):
            box = x.min(), x.max() + 1, y.min(), y.max() + 1
            area = (box[1] - box[0]) * (box[3] - box[2])
            found[name] = ((box[0] + box[1]) / 2, (box[2] + box[3]) / 2, float(area))
    return found


def answer_from_pixels(family: str, text: str, pixels: np.ndarray) -> str:
    """The answer that the picture itself gives."""
    seen, words = boxes(pixels), text.rstrip("?").split()
    if family == "name":
        (answer,) = seen
    elif family == "existence":
        answer = "yes" if words[-1] in seen else "no"
    elif family == "count":
        answer = COUNTS[len(seen) - 1]
    elif family == "half":
        axis = 0 if words[-1] == "right" else 1
        answer = words[-1] if seen[words[2]][axis] > SIZE / 2 else words[-3]
    elif family == "place":
        axis, sign = {"left": (0, 1), "right": (0, -1), "top": (1, 1), "bottom": (1, -1)}[words[-1]]
        answer = min(seen, key=lambda n: sign * seen[n][axis])
    elif family == "size":
        pick = max if words[3] == "biggest" else min
        answer = pick(seen, key=lambda n: seen[n][2])
    else:
        own = seen.pop(words[-1])
        answer = min(seen, key=lambda n: (seen[n][0] - own[0]) ** 2 + (seen[n][1] - own[1]) ** 2)
    return answer


ASKED = [f for f in FAMILIES if f != "reading"]


@pytest.mark.parametrize(
    "group", [pytest.param(n, marks=[pytest.mark.long] * (i > 1)) for i, n in enumerate(ASKED)]
)
def test_answers_follow_from_the_pixels(group: str) -> None:
    answers = set()
    for one in items(Drawings(), "test", 25, (group,)):
        pixels = render(one.scene, Drawings())
        assert one.answer == answer_from_pixels(group, one.query.text, pixels)
        assert one.answer in one.options and len(set(one.options)) == len(one.options)
        answers.add(one.answer)
    assert len(answers) > 1


def test_words_are_drawn_where_no_thing_is() -> None:
    """Only the pixels of the word's box change, and it covers no thing."""
    from dataclasses import replace

    for one in items(Drawings(), "test", 10, ("reading",)):
        (text,) = one.scene.texts
        assert one.answer == text.text
        bare = render(replace(one.scene, texts=()), Drawings())
        assert boxes(render(one.scene, Drawings())) == boxes(bare)
        y, x = np.nonzero((render(one.scene, Drawings()) != bare).any(-1))
        left, top, right, bottom = text.box
        assert left - 2 <= x.min() and x.max() <= right + 2
        assert top - 2 <= y.min() and y.max() <= bottom + 2


def test_splits_share_no_scene() -> None:
    scenes = [
        {repr(one.scene.things) for one in items(Drawings(), split, 20, ("place",))}
        for split in ("train", "validation", "test")
    ]
    assert not scenes[0] & scenes[1] | scenes[1] & scenes[2] | scenes[0] & scenes[2]


def named(frame: np.ndarray) -> set[str]:
    """Things with 40 or more pixels near their colour in a decoded frame."""
    return {
        name
        for name, color in COLORS.items()
        if (np.abs(frame.astype(int) - color).max(-1) < 60).sum() >= 40
    }


def test_written_clips_are_questions_whose_answers_are_in_their_frames(tmp_path: Path) -> None:
    asked = clip_items(Drawings(), "test", 3, ("appears", "leaves"), seconds=10.0)
    write_questions(asked, tmp_path, 224)
    questions = FileQuestions(tmp_path)
    assert len(questions) == 6
    for one in questions:
        options = dict(line.split(". ") for line in one.prompt.splitlines()[1:-1])
        answer = options[one.answer]
        clip = load_media(one.media[0])
        first, last = (named(np.asarray(clip[k])) for k in (0, -1))
        assert (answer in first, answer in last) == (
            one.family == "leaves",
            one.family == "appears",
        )
