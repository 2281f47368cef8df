"""Sequences of drawn screens in which small parts change from one screenshot to the next.

A desktop with a window: buttons and text fields in one colour each, icons on the desktop, a mouse
pointer. Between two screenshots the pointer moves, and one or two things change: a word, the colour
of an icon, the place of an icon, or a button that comes or goes. Everything is a pure function of
(split, family, index); no file is read.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw

from tokencomp.zoo.shapesqa.lettering import WORDS, extent, load_font
from tokencomp.zoo.shapesqa.render import shape_mask, thing_rgb
from tokencomp.zoo.shapesqa.scenes import COLORS, SHAPES, Thing

SIDE = 168  # px of a screen
CELL = 28  # px of a token
Box = tuple[int, int, int, int]
DARK_TEXT = ("orange", "yellow", "green", "cyan", "pink")  # colours under which letters are black
TRIES = 40
POINTER = ((0, 0), (0, 13), (4, 10), (9, 10))


@dataclass(frozen=True)
class Widget:
    """A button (`filled`), a text field, or an icon, which has a `shape` and no `word`.

    `box` is (left, top, right, bottom) in pixels; `since` the number of the screenshot in which it
    got its present looks.
    """

    color: str
    box: Box
    word: str = ""
    shape: str = ""
    size: int = 20
    font: str = "DejaVuSans"
    filled: bool = True
    since: int = 0

    @property
    def name(self) -> str:
        """What a click names: the word of a button or field, the shape of an icon."""
        return self.word or self.shape


@dataclass(frozen=True)
class Screen:
    """One screenshot: widgets from back to front, the pointer's tip, and the window behind them."""

    widgets: tuple[Widget, ...]
    pointer: tuple[int, int]
    window: Box
    desktop: tuple[int, int, int]


def sequence(rng: np.random.Generator, steps: int) -> list[Screen]:
    """`steps` screenshots of one session."""
    words = iter(rng.permutation(WORDS).tolist())
    colors = iter(rng.permutation(COLORS).tolist())
    shapes = iter(rng.permutation(SHAPES).tolist())
    widgets: list[Widget] = []
    for _ in range(int(rng.integers(2, 5))):
        _add_text(rng, widgets, next(colors), next(words), 0)
    for _ in range(int(rng.integers(1, 3))):
        _add_icon(rng, widgets, next(shapes), 0)
    left, top = rng.integers(2, 30, 2).tolist()
    right, bottom = (SIDE - rng.integers(2, 30, 2)).tolist()
    red, green, blue = rng.integers(60, 200, 3).tolist()
    window = (left, top, right, bottom)
    screens = [Screen(tuple(widgets), _pointer(rng), window, (red, green, blue))]
    for step in range(1, steps):
        changed: set[int] = set()
        for _ in range(int(rng.integers(1, 3))):
            _change(rng, widgets, changed, words, colors, step)
        screens.append(replace(screens[-1], widgets=tuple(widgets), pointer=_pointer(rng)))
    return screens


def _pointer(rng: np.random.Generator) -> tuple[int, int]:
    x, y = rng.integers(0, SIDE - 14, 2).tolist()
    return x, y


def _free(rng: np.random.Generator, widgets: list[Widget], width: int, height: int) -> Box | None:
    """A random place of this size that touches no widget."""
    for _ in range(TRIES):
        x, y = int(rng.integers(2, SIDE - width - 2)), int(rng.integers(2, SIDE - height - 2))
        box = (x, y, x + width, y + height)
        if all(
            x - 3 > w.box[2] or box[2] + 3 < w.box[0] or y - 3 > w.box[3] or box[3] + 3 < w.box[1]
            for w in widgets
        ):
            return box
    return None


def _add_text(
    rng: np.random.Generator, widgets: list[Widget], color: str, word: str, step: int
) -> None:
    size, font = int(rng.integers(18, 25)), str(rng.choice(("DejaVuSans", "DejaVuSans-Bold")))
    width = extent("moon", size, font)[0] + int(rng.integers(12, 24))
    box = _free(rng, widgets, width, size + int(rng.integers(10, 16)))
    if box is not None:
        filled = bool(rng.random() < 0.5)
        widgets.append(Widget(color, box, word, size=size, font=font, filled=filled, since=step))


def _add_icon(rng: np.random.Generator, widgets: list[Widget], shape: str, step: int) -> None:
    size = int(rng.integers(26, 40))
    box = _free(rng, widgets, size, size)
    if box is not None:
        widgets.append(Widget(str(rng.choice(COLORS)), box, shape=shape, size=size, since=step))


def _change(
    rng: np.random.Generator,
    widgets: list[Widget],
    changed: set[int],
    words: Iterator[str],
    colors: Iterator[str],
    step: int,
) -> None:
    """One change in place; a widget changes once in a step, and a text is never shown twice."""
    kind = rng.random()
    if kind < 0.12 and (color := next(colors, None)) is not None:
        _add_text(rng, widgets, color, next(words), step)
        return
    at = [k for k, w in enumerate(widgets) if w.since < step]
    if not at:
        return
    k = int(rng.choice(at))
    widget = widgets[k]
    if kind < 0.2 and len(widgets) > 3:
        del widgets[k]
    elif widget.word:
        widgets[k] = replace(widget, word=next(words), since=step)
    elif kind < 0.6:
        other = [color for color in COLORS if color != widget.color]
        widgets[k] = replace(widget, color=str(rng.choice(other)), since=step)
    else:
        others = [w for w in widgets if w is not widget]
        box = _free(rng, others, widget.size, widget.size)
        widgets[k] = replace(widget, box=box or widget.box, since=step if box else widget.since)


def draw(screen: Screen) -> np.ndarray:
    """The screenshot, uint8 (`SIDE`, `SIDE`, 3)."""
    image = Image.new("RGB", (SIDE, SIDE), screen.desktop)
    pen = ImageDraw.Draw(image)
    left, top, right, _ = screen.window
    pen.rectangle(screen.window, fill=(240, 240, 240), outline=(90, 90, 90))
    pen.rectangle((left, top, right, top + 10), fill=(120, 130, 150))
    for widget in screen.widgets:
        _draw_widget(image, pen, widget)
    x, y = screen.pointer
    pen.polygon([(x + dx, y + dy) for dx, dy in POINTER], fill="white", outline="black")
    return np.asarray(image)


def _draw_widget(image: Image.Image, pen: ImageDraw.ImageDraw, widget: Widget) -> None:
    fill = tuple(int(v) for v in thing_rgb(Thing("square", widget.color, 0, 0, 8)))
    if widget.shape:
        mask = Image.fromarray((255 * shape_mask(widget.shape, widget.size)).astype(np.uint8))
        image.paste(fill, widget.box[:2], mask)
        return
    if widget.filled:
        pen.rounded_rectangle(widget.box, 5, fill=fill, outline=(60, 60, 60))
    else:
        pen.rectangle(widget.box, fill="white", outline=fill, width=4)
    dark = not widget.filled or widget.color in DARK_TEXT
    font = load_font(widget.font, widget.size)
    ink = font.getbbox(widget.word)
    x, y = (
        (widget.box[k] + widget.box[k + 2] - int(ink[k + 2] - ink[k])) // 2 - int(ink[k])
        for k in (0, 1)
    )
    pen.text((x, y), widget.word, fill="black" if dark else "white", font=font)


def pixels(screens: list[Screen], quality: int | None) -> np.ndarray:
    """The screenshots, uint8 (steps, `SIDE`, `SIDE`, 3), each through JPEG of this quality."""
    drawn = [draw(screen) for screen in screens]
    return np.stack([d if quality is None else _jpeg(d, quality) for d in drawn])


def _jpeg(picture: np.ndarray, quality: int) -> np.ndarray:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=quality)
    return np.asarray(Image.open(buffer))


def cells_of(box: Box) -> np.ndarray:
    """The cells that a box touches, bool (rows, columns)."""
    out = np.zeros((SIDE // CELL, SIDE // CELL), bool)
    left, top, right, bottom = (v // CELL for v in box)
    out[top : bottom + 1, left : right + 1] = True
    return out


def kept_by_delta(frames: np.ndarray, threshold: int) -> np.ndarray:
    """Cells that differ by more than `threshold` from the last kept one at their place.

    Parameters
    ----------
    frames
        uint8 (steps, height, width, 3).

    Returns
    -------
    numpy.ndarray
        bool (steps, rows, columns); all True in the first.
    """
    steps, height, width, _ = frames.shape
    cut = frames.reshape(steps, height // CELL, CELL, width // CELL, CELL, 3)
    cells = cut.transpose(0, 1, 3, 2, 4, 5).reshape(steps, height // CELL, width // CELL, -1)
    cells = cells.astype(np.int16)
    kept, last = np.ones(cells.shape[:3], bool), cells[0].copy()
    for step in range(1, steps):
        kept[step] = np.abs(cells[step] - last).max(-1) > threshold
        last[kept[step]] = cells[step][kept[step]]
    return kept
