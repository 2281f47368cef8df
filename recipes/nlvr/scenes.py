"""Drawn scenes like those of NLVR: three grey boxes with towers of blocks or scattered items."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

COLORS = {"blue": (0, 153, 255), "black": (0, 0, 0), "yellow": (255, 255, 0)}
SHAPES = ("square", "triangle", "circle")
SIZES = {"small": 10, "medium": 20, "big": 30}
SIDE, GAP = 100, 50
"""Pixels of a box, and of the darker strip between two of them."""
BOX, STRIP = (211, 211, 211), (128, 128, 128)
SCALE = 4
"""Scenes are drawn this much larger, and made smaller with a filter."""
TOWERS = 0.66
"""Share of scenes with towers, near that of the development split."""
SNAP = 0.19
"""Share of items that touch the right wall, and of those that touch the base."""


@dataclass(frozen=True)
class Item:
    """A thing in a box: `x`, `y` is its upper left corner, in pixels of the box."""

    x: int
    y: int
    shape: str
    color: str
    size: int

    @property
    def walls(self) -> frozenset[str]:
        """Which walls of its box it touches."""
        at = {"left": self.x, "top": self.y}
        at |= {"right": SIDE - self.x - self.size, "base": SIDE - self.y - self.size}
        return frozenset(wall for wall, distance in at.items() if distance <= 0)


Box = tuple[Item, ...]
"""Items of a box; blocks of a tower from the base up."""


@dataclass(frozen=True)
class Scene:
    """Three boxes, all with towers or all with scattered items."""

    boxes: tuple[Box, ...]
    towers: bool

    @property
    def items(self) -> Box:
        return tuple(item for box in self.boxes for item in box)


def sample(rng: np.random.Generator) -> Scene:
    """A random scene."""
    towers = bool(rng.random() < TOWERS)
    few = int(rng.integers(1, 9)) if rng.random() < 0.7 else 3
    make = _tower if towers else lambda r: _scattered(r, few)
    return Scene(tuple(make(rng) for _ in range(3)), towers)


def _color(rng: np.random.Generator) -> str:
    return str(rng.choice([*COLORS]))


def _tower(rng: np.random.Generator) -> Box:
    """One to four blocks."""
    height = int(rng.choice([1, 2, 3, 4], p=[0.2, 0.25, 0.28, 0.27]))
    return tuple(Item(40, 80 - 21 * k, "square", _color(rng), 20) for k in range(height))


def _scattered(rng: np.random.Generator, most: int) -> Box:
    """Up to `most` items which do not overlap."""
    wanted = int(rng.integers(1, most + 1)) if rng.random() < 0.6 else most
    out: list[Item] = []
    for _ in range(40 * wanted):
        if len(out) == wanted:
            break
        size = int(rng.choice([*SIZES.values()]))
        x, y = (int(v) for v in rng.integers(0, SIDE - size + 1, 2))
        x = SIDE - size if rng.random() < SNAP else x
        y = SIDE - size if rng.random() < SNAP else y
        item = Item(x, y, str(rng.choice(SHAPES)), _color(rng), size)
        if all(_gap(item, other) >= 1 for other in out):
            out.append(item)
    return tuple(out)


def _gap(a: Item, b: Item) -> int:
    """Pixels between the squares around two items; negative where they overlap."""
    across = max(a.x, b.x) - min(a.x + a.size, b.x + b.size)
    down = max(a.y, b.y) - min(a.y + a.size, b.y + b.size)
    return max(across, down)


def draw(scene: Scene) -> Image.Image:
    """The picture, RGB, 400 by 100 pixels."""
    step = SIDE + GAP
    image = Image.new("RGB", ((2 * step + SIDE) * SCALE, SIDE * SCALE), STRIP)
    pen = ImageDraw.Draw(image)
    for k, box in enumerate(scene.boxes):
        left = k * step * SCALE
        pen.rectangle((left, 0, left + SIDE * SCALE - 1, SIDE * SCALE), BOX)
        for item in box:
            _draw(pen, item, left)
    return image.resize((2 * step + SIDE, SIDE), Image.Resampling.BOX)


def _draw(pen: ImageDraw.ImageDraw, item: Item, left: int) -> None:
    x0, y0 = left + item.x * SCALE, item.y * SCALE
    x1, y1 = x0 + item.size * SCALE - 1, y0 + item.size * SCALE - 1
    fill = COLORS[item.color]
    if item.shape == "square":
        pen.rectangle((x0, y0, x1, y1), fill)
    elif item.shape == "circle":
        pen.ellipse((x0, y0, x1, y1), fill)
    else:
        pen.polygon(((x0, y1), (x1, y1), ((x0 + x1) // 2, y0)), fill)
