"""Scenes of StampsQA: photographs and words on a background photograph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from PIL import Image

from recipes.photographs.grounds import Backgrounds, Ground, draw_ground, sample_ground
from recipes.tiny.labels import glyph_boxes
from tokencomp.zoo.shapesqa.lettering import WORDS, Text, draw_text, extent

SIZE = 448  # px, both sides
SIDES = (90.0, 208.0)  # px, the longer side of a thing
GAP = 5  # px, between things
TEXT_SHARE = 0.4
TEXT_SIZES = (48, 84)  # px
TEXT_FONTS = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif", "DejaVuSansMono")


class Library(Backgrounds, Protocol):
    """Pictures to compose: `sources.Photos`, or drawings in tests."""

    names: tuple[str, ...]

    def numbers(self, name: str, split: str) -> tuple[int, ...]:
        """The pictures of a thing that scenes of a split may show."""

    def picture(self, name: str, number: int) -> Image.Image:
        """An RGBA picture, cut to what is visible."""


@dataclass(frozen=True)
class Stamp:
    """One photograph in a scene; its box in pixels holds what is visible of it, tightly."""

    name: str
    number: int
    left: int
    top: int
    width: int
    height: int
    flip: bool

    @property
    def center(self) -> tuple[float, float]:
        return self.left + self.width / 2, self.top + self.height / 2

    @property
    def area(self) -> int:
        return self.width * self.height

    def overlaps(self, left: int, top: int, right: int, bottom: int) -> bool:
        """Whether the box comes nearer than `GAP` to this thing."""
        own = (self.left, self.top, self.left + self.width, self.top + self.height)
        return _touch(own, (left, top, right, bottom))


@dataclass(frozen=True)
class StampScene:
    """Things with distinct names before a background."""

    split: str
    things: tuple[Stamp, ...]
    ground: Ground
    texts: tuple[Text, ...] = ()


def sample(rng: np.random.Generator, library: Library, split: str) -> StampScene:
    """A random scene; photographs keep their aspect ratio and do not overlap."""
    count = int(rng.integers(1, 5))
    things: list[Stamp] = []
    for name in rng.permutation(library.names)[:count]:
        thing = place(rng, library, str(name), things, split)
        if thing is not None:
            things.append(thing)
    texts = _place_texts(rng, things, int(rng.random() < TEXT_SHARE))
    return StampScene(split, tuple(things), sample_ground(rng, library, split), texts)


def sample_words(rng: np.random.Generator, library: Library, split: str) -> StampScene:
    """A random scene full of words, for learning letters."""
    texts = _place_texts(rng, [], 20)
    return StampScene(split, (), sample_ground(rng, library, split), texts)


def place(
    rng: np.random.Generator,
    library: Library,
    name: str,
    things: Sequence[Stamp],
    split: str,
    sides: tuple[float, float] = SIDES,
    area: tuple[int, int, int, int] = (0, 0, SIZE, SIZE),
) -> Stamp | None:
    """A photograph in a free place of ``area`` (left, top, right, bottom); None if none is found.

    Its longer side lies in ``sides``; all in px.
    """
    number = int(rng.choice(library.numbers(name, split)))
    original = library.picture(name, number).size
    for _ in range(30):
        scale = rng.uniform(*sides) / max(original)
        width, height = (max(8, round(side * scale)) for side in original)
        left = int(rng.integers(area[0], area[2] - width + 1))
        top = int(rng.integers(area[1], area[3] - height + 1))
        if not any(t.overlaps(left, top, left + width, top + height) for t in things):
            return Stamp(name, number, left, top, width, height, bool(rng.random() < 0.5))
    return None


def _place_texts(rng: np.random.Generator, things: list[Stamp], count: int) -> tuple[Text, ...]:
    texts: list[Text] = []
    for _ in range(count):
        text = _place_text(rng, things, texts)
        texts += [] if text is None else [text]
    return tuple(texts)


def _place_text(rng: np.random.Generator, things: list[Stamp], texts: list[Text]) -> Text | None:
    word = WORDS[int(rng.integers(len(WORDS)))]
    font = TEXT_FONTS[int(rng.integers(len(TEXT_FONTS)))]
    size, dark = int(rng.integers(TEXT_SIZES[0], TEXT_SIZES[1] + 1)), bool(rng.random() < 0.5)
    width, height = extent(word, size, font)
    for _ in range(30):
        x = int(rng.integers(3, SIZE - width - 4))
        y = int(rng.integers(3, SIZE - height - 4))
        box = (x, y, x + width, y + height)
        if not any(t.overlaps(*box) for t in things) and not any(_touch(t.box, box) for t in texts):
            return Text(word, x, y, size, font, dark)
    return None


def _touch(one: tuple[int, int, int, int], other: tuple[int, int, int, int]) -> bool:
    return not (
        other[0] > one[2] + GAP
        or other[2] < one[0] - GAP
        or other[1] > one[3] + GAP
        or other[3] < one[1] - GAP
    )


def scaled(thing: Stamp, library: Library, factor: float = 1.0) -> Image.Image:
    """The photograph of a thing (RGBA), at ``factor`` times its size in the scene."""
    picture = library.picture(thing.name, thing.number)
    size = (round(thing.width * factor), round(thing.height * factor))
    picture = picture.resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0)
    return picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if thing.flip else picture


def render(scene: StampScene, library: Library) -> np.ndarray:
    """The picture, uint8 (SIZE, SIZE, 3)."""
    picture = draw_ground(scene.ground, library, scene.split, SIZE)
    for thing in scene.things:
        photo = scaled(thing, library)
        picture.paste(photo, (thing.left, thing.top), photo)
    pixels = np.asarray(picture)
    for text in scene.texts:
        pixels = draw_text(pixels, text)
    return pixels


def cell_names(scene: StampScene, library: Library, cell: int) -> list[list[str]]:
    """What each cell of ``cell`` px shows: the name of a thing, a word, or "" for the background.

    A thing has to cover 30 % of the cell, a word's box 15 %.
    """
    n = SIZE // cell
    names = [[""] * n for _ in range(n)]
    for thing in scene.things:
        mask = np.zeros((SIZE, SIZE), np.float32)
        alpha = np.asarray(scaled(thing, library).getchannel("A"), np.float32) / 255
        mask[thing.top : thing.top + thing.height, thing.left : thing.left + thing.width] = alpha
        _mark(names, mask, cell, thing.name, 0.3)
    for text in scene.texts:
        mask = np.zeros((SIZE, SIZE), np.float32)
        left, top, right, bottom = text.box
        mask[top:bottom, left:right] = 1
        _mark(names, mask, cell, text.text, 0.15)
    return names


def cell_letters(scene: StampScene, cell: int) -> list[list[str]]:
    """The letter at the middle of each cell of ``cell`` px, or ""."""
    letters = [[""] * (SIZE // cell) for _ in range(SIZE // cell)]
    for text in scene.texts:
        _, top, _, bottom = text.box
        for row in range(SIZE // cell):
            if not top <= (row + 0.5) * cell < bottom:
                continue
            for letter, left, right in glyph_boxes(text):
                for column in range(SIZE // cell):
                    if left <= (column + 0.5) * cell < right:
                        letters[row][column] = letter
    return letters


def _mark(names: list[list[str]], mask: np.ndarray, cell: int, name: str, share: float) -> None:
    n = len(names)
    covered = mask.reshape(n, cell, n, cell).mean((1, 3))
    for row, column in zip(*np.nonzero(covered >= share), strict=True):
        names[row][column] = name
