"""One-hop pairs of a key and its value, which spell out what the questions compose.

A question about places needs the place of an object before it can compare two; where nothing ever
names a place, the questions alone stay at chance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from recipes.tiny.labels import place
from tokencomp.zoo.shapesqa.scenes import COLORS, SHAPES, Scene, Thing

Pair = tuple[str, str]


def primer_pairs(name: str, scene: Scene, rng: np.random.Generator) -> list[Pair]:
    """All unambiguous pairs of one kind, in random order.

    Parameters
    ----------
    name : str
        A key of :data:`PRIMERS`.
    """
    pairs = list(PRIMERS[name](scene, rng))
    return [pairs[i] for i in rng.permutation(len(pairs))]


def _unique(scene: Scene, attribute: str) -> list[Thing]:
    words = [getattr(thing, attribute) for thing in scene.things]
    return [thing for thing in scene.things if words.count(getattr(thing, attribute)) == 1]


def _pairs(scene: Scene, rng: np.random.Generator) -> Iterator[Pair]:
    """Shape to colour and colour to shape."""
    for attribute, other in (("shape", "color"), ("color", "shape")):
        for thing in _unique(scene, attribute):
            yield f" {getattr(thing, attribute)}", getattr(thing, other)


def _places(scene: Scene, rng: np.random.Generator) -> Iterator[Pair]:
    """Column and row of each object in a grid of 8×8 over the picture."""
    for thing in _unique(scene, "shape"):
        x, y = thing.center(0.0)
        yield f" {thing.shape} column", str(place(x, scene.width))
        yield f" {thing.shape} row", str(place(y, scene.height))


def _sides(scene: Scene, rng: np.random.Generator) -> Iterator[Pair]:
    """Left or right of, above or below another object."""
    for a in _unique(scene, "shape"):
        for b in _unique(scene, "shape"):
            dx, dy = np.subtract(a.center(0.0), b.center(0.0))
            if abs(dx) >= 16:
                yield f" {a.shape} side {b.shape}", "right" if dx > 0 else "left"
            if abs(dy) >= 16:
                yield f" {a.shape} over {b.shape}", "below" if dy > 0 else "above"


def _numbers(scene: Scene, rng: np.random.Generator) -> Iterator[Pair]:
    """How many objects there are, in all, of each word, and of one word drawn at random."""
    yield " many objects", str(len(scene.things))
    for attribute, pool in (("shape", SHAPES), ("color", COLORS)):
        words = [getattr(thing, attribute) for thing in scene.things]
        for word in sorted({*words, pool[int(rng.integers(len(pool)))]}):
            yield f" many {word}", str(words.count(word))


def _text(scene: Scene, rng: np.random.Generator) -> Iterator[Pair]:
    """The word or number on the picture."""
    if len(scene.texts) == 1:
        yield " number" if scene.texts[0].number else " text", scene.texts[0].text


def _moves(scene: Scene, rng: np.random.Generator) -> Iterator[Pair]:
    for thing in _unique(scene, "shape"):
        if thing.direction:
            yield f" {thing.shape} moves", thing.direction


def _brief(scene: Scene, attribute: str) -> list[tuple[str, int]]:
    """Word and pair of frames of every object that is visible in one frame only."""
    return [
        (getattr(thing, attribute), int(thing.visible[0][0]) // 2)
        for thing in _unique(scene, attribute)
        if thing.brief
    ]


def _when(scene: Scene, rng: np.random.Generator) -> Iterator[Pair]:
    """In which pair of frames a brief object appears."""
    for attribute in ("shape", "color"):
        for word, pair in _brief(scene, attribute):
            yield f" {word} when", str(pair)


def _flashes(scene: Scene, rng: np.random.Generator) -> Iterator[Pair]:
    """How often an object appears."""
    for thing in _unique(scene, "shape"):
        if thing.visible:
            yield f" {thing.shape} flashes", str(len(thing.visible))


def _shown(scene: Scene, rng: np.random.Generator) -> Iterator[Pair]:
    """Whether an object that flashes appears in each pair of frames: what counting flashes adds."""
    for thing in _unique(scene, "shape"):
        for pair in range(scene.frames // 2) if thing.visible else ():
            seen = any(int(start) // 2 == pair for start, _ in thing.visible)
            yield f" {thing.shape} at {pair}", "yes" if seen else "no"


def _before(scene: Scene, rng: np.random.Generator) -> Iterator[Pair]:
    for a, early in _brief(scene, "shape"):
        for b, late in _brief(scene, "shape"):
            if early != late:
                yield f" {a} before {b}", "before" if early < late else "after"


def _first(scene: Scene, rng: np.random.Generator) -> Iterator[Pair]:
    """Which of two brief objects comes first or last."""
    for attribute in ("shape", "color"):
        for a, i in _brief(scene, attribute):
            for b, j in _brief(scene, attribute):
                if i != j:
                    which = ("first", "last")[int(rng.integers(2))]
                    yield f" {which} {a} {b}", a if (i < j) == (which == "first") else b


PRIMERS: dict[str, Callable[[Scene, np.random.Generator], Iterator[Pair]]] = {
    "pairs": _pairs,
    "places": _places,
    "sides": _sides,
    "numbers": _numbers,
    "text": _text,
    "moves": _moves,
    "when": _when,
    "flashes": _flashes,
    "shown": _shown,
    "before": _before,
    "first": _first,
}
