"""Scenes of StampsQA: one to four photographs on a background photograph, sometimes with a word."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from PIL import Image

from tokencomp.shapesqa.lettering import WORDS, Text, draw_text, extent

SIZE = 224  # px, both sides
SIDES = (52.0, 112.0)  # px, the longer side of a thing
GAP = 5  # px, between things
TEXT_SHARE = 0.4
TEXT_SIZES = (30, 48)  # px
TEXT_FONTS = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif", "DejaVuSansMono")


class Library(Protocol):
    """Pictures to compose: `sources.Photos`, or drawings in tests."""

    names: tuple[str, ...]

    def variants(self, name: str) -> int:
        """How many pictures of a thing there are."""

    def picture(self, name: str, number: int) -> Image.Image:
        """An RGBA picture, cut to what is visible."""

    def backgrounds(self, split: str) -> int:
        """How many backgrounds a split has."""

    def background(self, split: str, number: int) -> Image.Image:
        """An RGB picture of at least `SIZE` on both sides, or smaller."""


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
        return not (
            left > self.left + self.width + GAP
            or right < self.left - GAP
            or top > self.top + self.height + GAP
            or bottom < self.top - GAP
        )


@dataclass(frozen=True)
class StampScene:
    """Things with distinct names on a crop (fractions of the photograph) of a background."""

    split: str
    things: tuple[Stamp, ...]
    background: int
    crop: tuple[float, float, float]
    text: Text | None = None


def sample(rng: np.random.Generator, library: Library, split: str) -> StampScene:
    """A random scene; photographs keep their aspect ratio and do not overlap."""
    count = int(rng.integers(1, 5))
    things: list[Stamp] = []
    for name in rng.permutation(library.names)[:count]:
        thing = place(rng, library, str(name), things)
        if thing is not None:
            things.append(thing)
    text = _place_text(rng, things) if rng.random() < TEXT_SHARE else None
    background = int(rng.integers(library.backgrounds(split)))
    crop = (float(rng.uniform(0.4, 1.0)), float(rng.random()), float(rng.random()))
    return StampScene(split, tuple(things), background, crop, text)


def place(
    rng: np.random.Generator,
    library: Library,
    name: str,
    things: Sequence[Stamp],
    sides: tuple[float, float] = SIDES,
    area: tuple[int, int, int, int] = (0, 0, SIZE, SIZE),
) -> Stamp | None:
    """A photograph in a free place of ``area`` (left, top, right, bottom); None if none is found.

    Its longer side lies in ``sides``; all in px.
    """
    number = int(rng.integers(library.variants(name)))
    original = library.picture(name, number).size
    for _ in range(30):
        scale = rng.uniform(*sides) / max(original)
        width, height = (max(8, round(side * scale)) for side in original)
        left = int(rng.integers(area[0], area[2] - width + 1))
        top = int(rng.integers(area[1], area[3] - height + 1))
        if not any(t.overlaps(left, top, left + width, top + height) for t in things):
            return Stamp(name, number, left, top, width, height, bool(rng.random() < 0.5))
    return None


def _place_text(rng: np.random.Generator, things: list[Stamp]) -> Text | None:
    word = WORDS[int(rng.integers(len(WORDS)))]
    font = TEXT_FONTS[int(rng.integers(len(TEXT_FONTS)))]
    size, dark = int(rng.integers(TEXT_SIZES[0], TEXT_SIZES[1] + 1)), bool(rng.random() < 0.5)
    width, height = extent(word, size, font)
    for _ in range(30):
        x = int(rng.integers(3, SIZE - width - 4))
        y = int(rng.integers(3, SIZE - height - 4))
        if not any(t.overlaps(x, y, x + width, y + height) for t in things):
            return Text(word, x, y, size, font, dark)
    return None


def canvas(scene: StampScene, library: Library, size: int = SIZE) -> Image.Image:
    """A square crop of the background photograph, brought to ``size`` px."""
    photo = library.background(scene.split, scene.background)
    share, x, y = scene.crop
    side = max(16, int(min(photo.size) * share))
    left, top = int((photo.width - side) * x), int((photo.height - side) * y)
    box = (left, top, left + side, top + side)
    return photo.resize((size, size), Image.Resampling.BILINEAR, box)


def scaled(thing: Stamp, library: Library, factor: float = 1.0) -> Image.Image:
    """The photograph of a thing (RGBA), at ``factor`` times its size in the scene."""
    picture = library.picture(thing.name, thing.number)
    size = (round(thing.width * factor), round(thing.height * factor))
    picture = picture.resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0)
    return picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if thing.flip else picture


def render(scene: StampScene, library: Library) -> np.ndarray:
    """The picture, uint8 (SIZE, SIZE, 3)."""
    picture = canvas(scene, library)
    for thing in scene.things:
        photo = scaled(thing, library)
        picture.paste(photo, (thing.left, thing.top), photo)
    pixels = np.asarray(picture)
    return pixels if scene.text is None else draw_text(pixels, scene.text)


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
    if scene.text is not None:
        mask = np.zeros((SIZE, SIZE), np.float32)
        left, top, right, bottom = scene.text.box
        mask[top:bottom, left:right] = 1
        _mark(names, mask, cell, scene.text.text, 0.15)
    return names


def _mark(names: list[list[str]], mask: np.ndarray, cell: int, name: str, share: float) -> None:
    n = len(names)
    covered = mask.reshape(n, cell, n, cell).mean((1, 3))
    for row, column in zip(*np.nonzero(covered >= share), strict=True):
        names[row][column] = name
