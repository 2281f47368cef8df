"""Screens of four pages of MiniWoB++, views of them, and where a right click is."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from recipes.clicks.pages import SCALE, SIDE
from tokencomp.inputs.zoom import Region

CELL = 28
"""px of a visual token of the tiny model."""
SCREEN = 20 * CELL
"""px of a screen: 400 visual tokens."""
BINS = 64
"""Coordinates of an answer on either axis."""
SAME = ("click-button", "click-link", "click-tab", "click-test-2", "click-dialog-2")
"""Tasks whose instruction quotes the text of its target."""

Box = tuple[float, float, float, float]
"""left, top, right, bottom."""


@dataclass(frozen=True)
class Question:
    """An instruction, and the boxes in px of the screen that a right click hits."""

    task: str
    text: str
    boxes: tuple[Box, ...]

    def hit(self, x: float, y: float) -> bool:
        """Whether a click at this pixel of the screen is right."""
        return any(b[0] <= x <= b[2] and b[1] <= y <= b[3] for b in self.boxes)


@dataclass(frozen=True)
class Screen:
    """A picture with four pages.

    Attributes
    ----------
    picture
        uint8 (SCREEN, SCREEN, 3).
    questions
        The instruction of each page.
    others
        The same instructions about other elements of the pages, for training.
    """

    picture: np.ndarray
    questions: tuple[Question, ...]
    others: tuple[Question, ...]

    @property
    def image(self) -> Image.Image:
        return Image.fromarray(self.picture)


class Pages:
    """The stored pages of a split, by task."""

    def __init__(self, file: Path) -> None:
        with np.load(file) as stored:
            self.facts, self.pictures = json.loads(str(stored["facts"])), stored["pictures"]
        self.by_task: dict[str, list[int]] = {}
        for number, (task, *_) in enumerate(self.facts):
            self.by_task.setdefault(task, []).append(number)

    def screen(self, numbers: list[int], rng: np.random.Generator) -> Screen:
        """Four pages in four quarters, each at a random offset in its quarter."""
        half = SCREEN // 2
        picture = np.full((SCREEN, SCREEN, 3), 255, np.uint8)
        asked, others = [], []
        for corner, number in zip(rng.permutation(4), numbers, strict=True):
            page = self.pictures[number]
            room = half - len(page)
            left, top = (int(c) * half + int(rng.integers(room + 1)) for c in divmod(corner, 2))
            picture[top : top + len(page), left : left + len(page)] = page
            made = [_moved(q, left, top) for q in questions(*self.facts[number])]
            asked.append(made[0])
            others += made[1:]
        return Screen(picture, tuple(asked), tuple(others))

    def random(self, rng: np.random.Generator) -> Screen:
        """A screen with pages of four tasks."""
        tasks = rng.choice([*self.by_task], 4, replace=False)
        return self.screen([int(rng.choice(self.by_task[t])) for t in tasks], rng)

    def fixed(self, seed: int = 0) -> Iterator[Screen]:
        """Every page once, with three pages of other tasks, while four tasks have pages."""
        rng = np.random.default_rng(seed)
        left = {task: [*rng.permutation(numbers)] for task, numbers in self.by_task.items()}
        while sum(bool(v) for v in left.values()) >= 4:
            tasks = sorted(left, key=lambda t: (-len(left[t]), rng.random()))[:4]
            yield self.screen([int(left[t].pop()) for t in tasks], rng)


def questions(task: str, text: str, elements: list[Any]) -> list[Question]:
    """The instruction of a page, then the same instruction about other elements, for training.

    `elements` are (name, text, left, top, right, bottom, right click) in px of the page.
    """
    right = [e for e in elements if e[6] and min(e[2:4]) >= 0 and max(e[4:6]) <= SIDE]
    right.sort(key=lambda e: (round(e[3] + e[5], -1), e[2] + e[4]))  # in reading order
    out = [Question(task, text, tuple(tuple(e[2:6]) for e in right))]
    name, shown = right[0][:2]
    if task in SAME and shown and shown in text:
        for other in dict.fromkeys(e[1] for e in elements if e[0].split()[0] == name.split()[0]):
            found = [e for e in elements if e[1] == other and e[0].split()[0] == name.split()[0]]
            if other and other != shown and all(e[4] <= SIDE and e[5] <= SIDE for e in found):
                boxes = tuple(tuple(e[2:6]) for e in found)
                out.append(Question(task, reworded(text, shown, other), boxes))
    circles = [e for e in elements if e[0].startswith("circle")]
    if task == "grid-coordinate" and len(circles) == 25:
        xs, ys = (sorted({round(e[k]) for e in circles}) for k in (2, 3))
        for e in circles if len(xs) == len(ys) == 5 else ():
            at = f"({xs.index(round(e[2])) - 2},{2 - ys.index(round(e[3]))})"
            out.append(Question(task, f"Click on the grid coordinate {at}.", (tuple(e[2:6]),)))
    return out


def reworded(text: str, shown: str, other: str) -> str:
    """The instruction with another target; the cross of a dialog is "x" there."""
    name = "x" if other == "Close" else other
    quoted = f'"{shown}"'
    return text.replace(quoted, f'"{name}"') if quoted in text else text.replace(shown, name)


def _moved(question: Question, left: int, top: int) -> Question:
    boxes = tuple(
        tuple(SCALE * v + (left, top)[k % 2] for k, v in enumerate(box)) for box in question.boxes
    )
    return Question(question.task, question.text, boxes)  # type: ignore[arg-type]


def view(picture: Image.Image, cells: int) -> Image.Image:
    """A square picture scaled to `cells` tokens a side."""
    return picture.resize((cells * CELL, cells * CELL), Image.Resampling.BICUBIC)


def bins(box: Box, region: Region) -> tuple[int, int]:
    """The coordinates of an answer: the bins with the middle of a box, in a region."""
    x, y = (box[0] + box[2]) / 2 - region.left, (box[1] + box[3]) / 2 - region.top
    return int(BINS * x / region.width), int(BINS * y / region.height)


def pixel(answer: tuple[int, int], region: Region) -> tuple[int, int]:
    """The pixel of the screen in the middle of the answered bins."""
    x, y = answer
    return region.locate(x + 0.5, y + 0.5, seen=(BINS, BINS))
