"""The pictures of long questions drawn in another way; places, sizes and words stay the same.

==========  ================================  ==============================================
            `tokencomp.zoo.shapesqa.render`   here
==========  ================================  ==============================================
ground      textures, clutter, grain          ruled, dotted or squared paper, light or dark
objects     flat, upright, anywhere in their  shaded, with an outline and a shadow, turned by
            place                             up to 12°, near the middle of their place
colours     hues of `HUES`, saturated         other hues and paler, darker or duller shades
words       DejaVu, outlined, anywhere in     STIX and Computer Modern, without an outline, in
            their line                        lines that are centred on the page
==========  ================================  ==============================================
"""

from __future__ import annotations

import colorsys
import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from tokencomp.zoo.shapesqa.facts import ROWS, SIDES
from tokencomp.zoo.shapesqa.lettering import Text, load_font
from tokencomp.zoo.shapesqa.long_scenes import LongItem, place_number
from tokencomp.zoo.shapesqa.scenes import Scene, Thing

FONTS = ("STIXGeneral", "STIXGeneralBol", "cmss10", "cmb10")
HUES = {
    "red": 356, "orange": 31, "yellow": 50, "green": 132, "cyan": 184, "blue": 221,
    "purple": 270, "pink": 331,
}  # fmt: skip
TURN = 12.0
"""Largest rotation of an object, in degrees."""
WANDER = 0.35
"""How far from the middle of its place an object goes, as a share of the room there."""
SCALE = 4
"""Supersampling."""


@dataclass(frozen=True)
class Redrawn(LongItem):
    """An item whose pictures are drawn here."""

    def media(self) -> tuple[Image.Image, ...]:
        return tuple(draw(scene) for scene in self.scenes)


def redrawn(one: LongItem) -> Redrawn:
    """The same question about the same scenes, drawn in another way; pictures alone."""
    return Redrawn(one.id, one.family, one.scenes, one.question, one.facts)


def draw(scene: Scene) -> Image.Image:
    """A picture, a pure function of its scene. Two pictures of a pair share their ground."""
    rng = np.random.default_rng([scene.background, 7])
    dark = bool(rng.random() < 0.4)
    image = _ground(rng, scene.width, scene.height, dark)
    for thing in scene.things:
        _paste(image, thing, scene)
    _write(image, scene.texts, str(rng.choice(FONTS)), dark)
    return image


def _ground(rng: np.random.Generator, width: int, height: int, dark: bool) -> Image.Image:
    """Paper with lines, squares or dots, a little darker towards one side."""
    value = rng.uniform(0.10, 0.24) if dark else rng.uniform(0.80, 0.97)
    paper = 255 * np.asarray(colorsys.hsv_to_rgb(rng.random(), rng.uniform(0, 0.12), value))
    fade = np.linspace(1.0, rng.uniform(0.88, 1.0), width if rng.random() < 0.5 else height)
    fade = fade[None, :, None] if len(fade) == width and rng.random() < 0.5 else fade[:, None, None]
    pixels = np.broadcast_to(paper, (height, width, 3)) * fade[:height, :width]
    image = Image.fromarray(pixels.round().astype(np.uint8))
    pen, ink = ImageDraw.Draw(image), tuple(int(c * (1.35 if dark else 0.86)) for c in paper)
    step, kind = int(rng.integers(14, 30)), str(rng.choice(["lines", "squares", "dots"]))
    if kind == "dots":
        for x in range(step // 2, width, step):
            for y in range(step // 2, height, step):
                pen.ellipse((x - 1, y - 1, x + 1, y + 1), fill=ink)
        return image
    for y in range(step // 2, height, step):
        pen.line((0, y, width, y), fill=ink)
    for x in range(step // 2, width if kind == "squares" else 0, step):
        pen.line((x, 0, x, height), fill=ink)
    return image


def _paste(image: Image.Image, thing: Thing, scene: Scene) -> None:
    """An object over its shadow."""
    place = place_number(thing.center(), scene.width, scene.height)
    rng = np.random.default_rng([scene.background, place, thing.size])
    x, y = _middle(rng, place, thing.size, scene.width, scene.height)
    shape = _shape(thing.shape, thing.size, float(rng.uniform(-TURN, TURN)))
    rim = ImageChops.subtract(shape, shape.filter(ImageFilter.MinFilter(2 * SCALE + 1)))
    shape, rim = (part.reduce(SCALE) for part in (shape, rim))
    left, top = round(x - shape.width / 2), round(y - shape.height / 2)
    shadow = shape.filter(ImageFilter.GaussianBlur(1.5)).point(lambda v: v * 0.35)
    image.paste((0, 0, 0), (left + 2, top + 2), shadow)
    image.paste(_shaded(thing.color, shape.size, rng), (left, top), shape)
    image.paste((25, 25, 30), (left, top), rim.point(lambda v: v * 0.7))


def _middle(
    rng: np.random.Generator, place: int, size: int, width: int, height: int
) -> tuple[float, float]:
    """A point near the middle of a place, so that an object stays in it as far as it fits."""
    row, column = divmod(place, len(SIDES))
    out = []
    for number, parts, side in ((column, len(SIDES), width), (row, len(ROWS), height)):
        room = max(0.0, side / parts - size - 4) / 2
        out.append((number + 0.5) * side / parts + float(rng.uniform(-WANDER, WANDER)) * room)
    return out[0], out[1]


def _shaded(color: str, size: tuple[int, int], rng: np.random.Generator) -> Image.Image:
    """A colour that is lighter at the top left than at the bottom right."""
    hue = (HUES[color] + rng.uniform(-4, 4)) % 360 / 360
    rgb = 255 * np.asarray(
        colorsys.hsv_to_rgb(hue, rng.uniform(0.72, 0.95), rng.uniform(0.72, 0.95))
    )
    y, x = np.mgrid[0 : size[1], 0 : size[0]]
    light = 1.12 - 0.3 * (x / size[0] + y / size[1]) / 2
    return Image.fromarray(np.clip(light[..., None] * rgb, 0, 255).astype(np.uint8))


@lru_cache(maxsize=4096)
def _shape(name: str, size: int, angle: float) -> Image.Image:
    """Coverage of a shape, turned, at `SCALE` times its size with a margin around it."""
    side = (size + 6) * SCALE
    canvas = Image.new("L", (side, side), 0)
    pen, c, r = ImageDraw.Draw(canvas), side / 2, size * SCALE / 2
    if name in ("circle", "ring"):
        pen.ellipse((c - r, c - r, c + r, c + r), fill=255)
        if name == "ring":
            pen.ellipse((c - r * 0.55, c - r * 0.55, c + r * 0.55, c + r * 0.55), fill=0)
        return canvas
    if name == "cross":
        for w, h in ((r, r * 0.36), (r * 0.36, r)):
            pen.rectangle((c - w, c - h, c + w, c + h), fill=255)
    else:
        pen.polygon([(c + r * x, c + r * y) for x, y in _corners(name)], fill=255)
    return canvas.rotate(angle, Image.Resampling.BICUBIC)


def _corners(name: str) -> list[tuple[float, float]]:
    """Corners in [-1, 1]."""
    if name == "star":
        turns = [math.pi * k / 5 - math.pi / 2 for k in range(10)]
        return [
            ((0.46 if k % 2 else 1.0) * math.cos(t), (0.46 if k % 2 else 1.0) * math.sin(t))
            for k, t in enumerate(turns)
        ]
    return {
        "square": [(-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)],
        "triangle": [(0.0, -0.95), (0.95, 0.85), (-0.95, 0.85)],
        "diamond": [(0.0, -1.0), (0.68, 0.0), (0.0, 1.0), (-0.68, 0.0)],
    }[name]


def _write(image: Image.Image, texts: tuple[Text, ...], name: str, dark: bool) -> None:
    """Words line by line, each line centred, with the same gaps between its words."""
    lines: list[list[Text]] = []
    for text in texts:  # in reading order: a word left of the one before begins a line
        if not lines or text.x <= lines[-1][-1].x:
            lines.append([])
        lines[-1].append(text)
    pen, ink = ImageDraw.Draw(image), (238, 238, 230) if dark else (20, 22, 40)
    for number, line in enumerate(lines):
        font = load_font(name, line[0].size + 4)  # these fonts have smaller letters than DejaVu
        widths = [font.getlength(text.text) for text in line]
        gap = min(42.0, (image.width - 12 - sum(widths)) / len(line))
        x = (image.width - sum(widths) - gap * (len(line) - 1)) / 2
        y = (number + 0.5) * image.height / len(lines)
        for text, width in zip(line, widths, strict=True):
            pen.text((x, y), text.text, fill=ink, font=font, anchor="lm")
            x += width + gap
