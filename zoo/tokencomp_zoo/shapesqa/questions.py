"""Question families of ShapesQA: each one turns a scene into question, answer and options."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tokencomp.zoo.shapesqa.lettering import WORDS
from tokencomp.zoo.shapesqa.scenes import COLORS, DIRECTIONS, SHAPES, Scene, Thing

PLURALS = {shape: shape + ("es" if shape == "cross" else "s") for shape in SHAPES}


@dataclass(frozen=True)
class Question:
    """One question about a scene, with a one-word answer that is one of ``options``.

    ``things`` are indices into ``scene.things``: the evidence, for pictures and analysis only.
    """

    family: str
    text: str
    answer: str
    options: tuple[str, ...]
    things: tuple[int, ...] = ()


Asker = Callable[[Scene, np.random.Generator], Question | None]
IMAGE_FAMILIES = ("attribute", "existence", "count", "position", "small_object")
VIDEO_FAMILIES = ("needle", "order", "direction", "action_count")


def families(kind: str) -> tuple[str, ...]:
    """Names of the question families for ``kind`` ("image" or "video")."""
    return IMAGE_FAMILIES if kind == "image" else VIDEO_FAMILIES


def ask(scene: Scene, family: str, rng: np.random.Generator) -> Question | None:
    """Ask a question of ``family``, or None when the scene has no unambiguous one."""
    return FAMILIES[family](scene, rng)


def draw_options(answer: str, pool: tuple[str, ...], rng: np.random.Generator) -> tuple[str, ...]:
    """Up to four options in random order, the answer among them."""
    wrong = [word for word in pool if word != answer]
    chosen = [answer, *(str(w) for w in rng.permutation(wrong)[:3])]
    return tuple(str(word) for word in rng.permutation(chosen))


def _counts(answer: int, low: int, rng: np.random.Generator) -> tuple[str, ...]:
    """Four consecutive numbers around ``answer``, none below ``low``, in rising order."""
    first = max(low, answer - int(rng.integers(4)))
    return tuple(str(first + k) for k in range(4))


def _pick(items: list, rng: np.random.Generator):
    return items[int(rng.integers(len(items)))]


def _unique(
    scene: Scene, attribute: str, among: list[int] | None = None, within: list[int] | None = None
) -> list[int]:
    """Those of ``among`` whose ``attribute`` no other thing of ``within`` shares; None: of all."""
    every = list(range(len(scene.things)))
    words = [getattr(thing, attribute) for thing in scene.things]
    tally = Counter(words[i] for i in (every if within is None else within))
    return [i for i in (every if among is None else among) if tally[words[i]] == 1]


def _attribute(
    scene: Scene,
    among: list[int],
    family: str,
    rng: np.random.Generator,
    within: list[int] | None = None,
    adjective: str = "",
) -> Question | None:
    """Colour of a unique shape, or shape of a unique colour."""
    shared = "shape" if rng.random() < 0.6 else "color"
    matching = _unique(scene, shared, among, within)
    if not matching:
        return None
    index = _pick(matching, rng)
    thing: Thing = scene.things[index]
    if shared == "shape":
        text, answer = f"What color is the {adjective}{thing.shape}?", thing.color
        return Question(family, text, answer, draw_options(answer, COLORS, rng), (index,))
    text, answer = f"What shape is the {adjective}{thing.color} object?", thing.shape
    return Question(family, text, answer, draw_options(answer, SHAPES, rng), (index,))


def attribute(scene: Scene, rng: np.random.Generator) -> Question | None:
    """What color is the X? What shape is the Y object? The object is at least 28 px."""
    large = [i for i, thing in enumerate(scene.things) if not thing.small]
    return _attribute(scene, large, "attribute", rng)


def small_object(scene: Scene, rng: np.random.Generator) -> Question | None:
    """Like `attribute`, about objects of at most `SMALL` px, unique among those."""
    small = [i for i, thing in enumerate(scene.things) if thing.small]
    return _attribute(scene, small, "small_object", rng, small, "small ")


def _exists(scene: Scene, rng: np.random.Generator, family: str, suffix: str = "") -> Question:
    """Is there a C S? Half yes; most negatives swap words that are both present."""
    present = [(thing.color, thing.shape) for thing in scene.things]
    evidence: tuple[int, ...] = ()
    if rng.random() < 0.5:
        index = int(rng.integers(len(present)))
        (color, shape), answer, evidence = present[index], "yes", (index,)
    else:
        color, shape = _absent(present, rng)
        answer = "no"
    article = "an" if color[0] in "aeiou" else "a"
    text = f"Is there {article} {color} {shape}{suffix}?"
    order = ("yes", "no") if rng.random() < 0.5 else ("no", "yes")
    return Question(family, text, answer, order, evidence)


def _absent(present: list[tuple[str, str]], rng: np.random.Generator) -> tuple[str, str]:
    """A colour and shape not in the scene together: both, one or none of the words present."""
    colors, shapes = {c for c, _ in present}, {s for _, s in present}
    kind = rng.random()
    near_colors = sorted(colors) if kind < 0.75 else list(COLORS)
    near_shapes = sorted(shapes) if kind < 0.5 or kind >= 0.75 else list(SHAPES)
    pairs = [(c, s) for c in near_colors for s in near_shapes if (c, s) not in present]
    if not pairs:
        pairs = [(c, s) for c in COLORS for s in SHAPES if (c, s) not in present]
    return _pick(pairs, rng)


def existence(scene: Scene, rng: np.random.Generator) -> Question | None:
    """Is there a red circle? yes or no."""
    return _exists(scene, rng, "existence")


def count(scene: Scene, rng: np.random.Generator) -> Question | None:
    """How many objects, red objects or circles are there? 0 to 5."""
    kind = rng.random()
    if kind < 0.3:
        matches, words = list(range(len(scene.things))), "objects"
    elif kind < 0.65:
        color = _weighted([t.color for t in scene.things], COLORS, rng)
        matches = [i for i, thing in enumerate(scene.things) if thing.color == color]
        words = f"{color} objects"
    else:
        shape = _weighted([t.shape for t in scene.things], SHAPES, rng)
        matches = [i for i, thing in enumerate(scene.things) if thing.shape == shape]
        words = PLURALS[shape]
    text = f"How many {words} are there?"
    answer = len(matches)
    return Question("count", text, str(answer), _counts(answer, 0, rng), tuple(matches))


def _weighted(present: list[str], pool: tuple[str, ...], rng: np.random.Generator) -> str:
    """A word to count: now and then absent, else preferring the one that occurs most."""
    if rng.random() < 0.2:
        absent = [word for word in pool if word not in present]
        return str(_pick(absent, rng))
    if rng.random() < 0.5:
        return Counter(present).most_common(1)[0][0]
    return str(_pick(present, rng))


def position(scene: Scene, rng: np.random.Generator) -> Question | None:
    """Left or right of another object, above or below it, or which half of the image."""
    matching = _unique(scene, "shape")
    if not matching:
        return None
    axis = int(rng.integers(2))
    if rng.random() < 0.5:
        return _half(scene, _pick(matching, rng), axis, rng)
    return _relative(scene, matching, axis, rng)


def _half(scene: Scene, index: int, axis: int, rng: np.random.Generator) -> Question | None:
    thing = scene.things[index]
    offset = thing.center()[axis] - (scene.width, scene.height)[axis] / 2
    if abs(offset) < 14:
        return None
    names = (("left", "right"), ("top", "bottom"))[axis]
    order = names if rng.random() < 0.5 else names[::-1]
    text = f"Is the {thing.shape} in the {names[0]} or {names[1]} half of the image?"
    return Question("position", text, names[int(offset > 0)], order, (index,))


def _relative(
    scene: Scene, matching: list[int], axis: int, rng: np.random.Generator
) -> Question | None:
    if len(matching) < 2:
        return None
    first, second = (int(i) for i in rng.permutation(matching)[:2])
    a, b = scene.things[first], scene.things[second]
    offset = a.center()[axis] - b.center()[axis]
    if abs(offset) < 24:
        return None
    names = (("left", "right"), ("above", "below"))[axis]
    order = names if rng.random() < 0.5 else names[::-1]
    middle = "to the left or right of" if axis == 0 else "above or below"
    text = f"Is the {a.shape} {middle} the {b.shape}?"
    return Question("position", text, names[int(offset > 0)], order, (first, second))


def needle(scene: Scene, rng: np.random.Generator) -> Question | None:
    """Attribute of an object that one logical frame alone shows."""
    brief = [i for i, thing in enumerate(scene.things) if thing.brief]
    return _attribute(scene, brief, "needle", rng)


def order(scene: Scene, rng: np.random.Generator) -> Question | None:
    """Which of two brief objects comes first or last, or before or after the other."""
    brief = [i for i in _unique(scene, "shape") if scene.things[i].brief]
    brief = [i for i in _unique(scene, "color", brief)]
    if len(brief) < 2:
        return None
    first, second = (int(i) for i in rng.permutation(brief)[:2])
    a, b = scene.things[first], scene.things[second]
    a_is_first = a.visible[0][0] < b.visible[0][0]
    kind = rng.random()
    if kind < 0.3:
        text = f"Does the {a.shape} appear before or after the {b.shape}?"
        names = ("before", "after") if rng.random() < 0.5 else ("after", "before")
        answer = "before" if a_is_first else "after"
        return Question("order", text, answer, names, (first, second))
    which = "first" if rng.random() < 0.5 else "last"
    winner = a if a_is_first == (which == "first") else b
    if kind < 0.65:
        text = f"Which shape appears {which}, {a.shape} or {b.shape}?"
        return Question("order", text, winner.shape, (a.shape, b.shape), (first, second))
    text = f"Which color appears {which}, {a.color} or {b.color}?"
    return Question("order", text, winner.color, (a.color, b.color), (first, second))


def direction(scene: Scene, rng: np.random.Generator) -> Question | None:
    """Which direction does the object move? left, right, up or down."""
    moving = [i for i in _unique(scene, "shape") if scene.things[i].moving]
    if not moving:
        return None
    index = _pick(moving, rng)
    thing = scene.things[index]
    text = f"Which direction does the {thing.shape} move?"
    answer = str(thing.direction)
    return Question(
        "direction", text, answer, draw_options(answer, tuple(DIRECTIONS), rng), (index,)
    )


def action_count(scene: Scene, rng: np.random.Generator) -> Question | None:
    """How many times does the object flash? 1 to 4."""
    flashing = [i for i in _unique(scene, "shape") if scene.things[i].visible]
    if not flashing:
        return None
    many = [i for i in flashing if len(scene.things[i].visible) > 1]
    index = _pick(many if many and rng.random() < 0.8 else flashing, rng)
    thing = scene.things[index]
    answer = len(thing.visible)
    text = f"How many times does the {thing.shape} flash?"
    return Question("action_count", text, str(answer), ("1", "2", "3", "4"), (index,))


def video_existence(scene: Scene, rng: np.random.Generator) -> Question | None:
    """Is there a red circle in the video? Positives may be visible in one frame only."""
    return _exists(scene, rng, "video_existence", " in the video")


def reading(scene: Scene, rng: np.random.Generator) -> Question | None:
    """Which word or number stands on the picture? There must be exactly one."""
    if len(scene.texts) != 1:
        return None
    word = scene.texts[0].text
    if scene.texts[0].number:
        near = tuple(str(n) for n in range(10, 100) if len({*str(n)} & {*word}) == 1)
        return Question("reading", "What number is written?", word, draw_options(word, near, rng))
    return Question("reading", "What does the text say?", word, draw_options(word, WORDS, rng))


FAMILIES: dict[str, Asker] = {
    asker.__name__: asker
    for asker in (
        *(attribute, small_object, existence, count, position),
        *(needle, order, direction, action_count, video_existence),
        reading,
    )
}
"""By name; each asks a scene its question, and gives None where there is no unambiguous one."""
