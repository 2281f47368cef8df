"""Questions about the last screenshot of a session, and the one-hop pairs that they compose."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from recipes.screens.scenes import CELL, Screen, Widget, cells_of, kept_by_delta, pixels, sequence
from tokencomp.zoo.shapesqa.items import stream

KINDS = ("read", "icon", "click")
STATES = ("changed", "unchanged")
FAMILIES = tuple(f"{kind}_{state}" for kind in KINDS for state in STATES)
QUALITIES = (None, 75, 85, 95)  # of JPEG; None: pixels as drawn
STRICT = 8  # threshold in pixel values under which an unchanged widget has to be dropped


def place(widget: Widget) -> tuple[int, int]:
    """Column and row of the cell in which the middle of a widget is."""
    left, top, right, bottom = widget.box
    return (left + right) // 2 // CELL, (top + bottom) // 2 // CELL


def ask(kind: str, widget: Widget) -> tuple[str, str]:
    """Question and answer of one kind about a widget."""
    if kind == "read":
        return f"What does the {widget.color} text say?", widget.word
    if kind == "icon":
        return f"What color is the {widget.shape}?", widget.color
    column, row = place(widget)
    return f"Where is {widget.name}?", f"{column},{row}"


def pairs(screen: Screen) -> list[tuple[str, str, str]]:
    """(name, key, value) of everything that the questions ask, one hop each."""
    out = []
    for widget in screen.widgets:
        column, row = place(widget)
        if widget.word:
            out.append(("p-read", f" {widget.color} text", widget.word))
        else:
            out.append(("p-icon", f" {widget.shape}", widget.color))
        out.append(("p-column", f" {widget.name} column", str(column)))
        out.append(("p-row", f" {widget.name} row", str(row)))
    return out


def kinds_of(widget: Widget) -> tuple[str, str]:
    return ("read" if widget.word else "icon"), "click"


@dataclass(frozen=True)
class Item:
    """One question about the last screenshot of a session."""

    id: str
    family: str
    screens: tuple[Screen, ...]
    quality: int | None
    widget: Widget
    question: str
    answer: str

    @cached_property
    def frames(self) -> np.ndarray:
        """uint8 (steps, side, side, 3)."""
        return pixels(list(self.screens), self.quality)


def item(split: str, family: str, index: int, steps: tuple[int, ...] = (2, 3, 4)) -> Item:
    """The question with this number.

    A widget is changed if it got its looks in the last screenshot, and unchanged if `delta` at
    threshold `STRICT` keeps none of its cells there: its answer is then in an older one alone.
    """
    rng = stream(split, "screens", family, index, max(steps))
    kind, state = family.split("_")
    while True:
        screens = sequence(rng, int(rng.choice(steps)))
        quality = QUALITIES[int(rng.integers(len(QUALITIES)))]
        last = len(screens) - 1
        kept = kept_by_delta(pixels(screens, quality), STRICT)[last]
        fit = [
            w
            for w in screens[last].widgets
            if kind in kinds_of(w)
            and (w.since == last if state == "changed" else not (kept & cells_of(w.box)).any())
        ]
        if fit:
            widget = fit[int(rng.integers(len(fit)))]
            question, answer = ask(kind, widget)
            name = f"{split}-{family}-{index}"
            return Item(name, family, tuple(screens), quality, widget, question, answer)
