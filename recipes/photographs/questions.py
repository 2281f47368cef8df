"""Questions of StampsQA, derived from the names and boxes of a scene's things."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from recipes.photographs.scenes import SIZE, Stamp, StampScene
from tokencomp.zoo.shapesqa.lettering import WORDS
from tokencomp.zoo.shapesqa.questions import Question, draw_options

COUNTS = ("one", "two", "three", "four")
MARGIN = 56  # px by which an outermost thing, or a thing in a half, has to be clear
NEARER = 1.35  # times by which the nearest thing is nearer than the next
LARGER = 1.7  # times by which the biggest thing is bigger than the next
EDGES = {"left": (0, -1), "right": (0, 1), "top": (1, -1), "bottom": (1, 1)}

Asker = Callable[[StampScene, tuple[str, ...], np.random.Generator], Question | None]


def pick(things: Sequence[Stamp], rng: np.random.Generator) -> Stamp:
    return things[int(rng.integers(len(things)))]


def named(
    family: str, text: str, answer: str, scene: StampScene, names: tuple[str, ...], rng
) -> Question:
    """A question whose answer is a thing's name; the scene's other things are options first."""
    others = [t.name for t in scene.things if t.name != answer]
    absent = [n for n in rng.permutation(names) if n != answer and n not in others]
    pool = (*others, *(str(n) for n in absent))[:3]
    return Question(family, text, answer, draw_options(answer, pool, rng))


def article(name: str) -> str:
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def naming(scene: StampScene, names: tuple[str, ...], rng: np.random.Generator) -> Question | None:
    """What is in the picture? For scenes of one thing."""
    if len(scene.things) != 1:
        return None
    return named("name", "What is in the picture?", scene.things[0].name, scene, names, rng)


def existence(
    scene: StampScene, names: tuple[str, ...], rng: np.random.Generator
) -> Question | None:
    """Is there an X? Half yes."""
    if not scene.things:
        return None
    present = [t.name for t in scene.things]
    absent = [n for n in names if n not in present]
    is_shown = bool(rng.random() < 0.5) or not absent
    name = str(rng.choice(present if is_shown else absent))
    order = ("yes", "no") if rng.random() < 0.5 else ("no", "yes")
    return Question("existence", f"Is there {article(name)}?", "yes" if is_shown else "no", order)


def half(scene: StampScene, names: tuple[str, ...], rng: np.random.Generator) -> Question | None:
    """In which half of the picture is the X?"""
    axis = int(rng.integers(2))
    clear = [t for t in scene.things if abs(t.center[axis] - SIZE / 2) >= MARGIN / 2]
    if not clear:
        return None
    thing = pick(clear, rng)
    words = (("left", "right"), ("top", "bottom"))[axis]
    answer = words[int(thing.center[axis] > SIZE / 2)]
    order = words if rng.random() < 0.5 else words[::-1]
    return Question("half", f"Is the {thing.name} at the {words[0]} or {words[1]}?", answer, order)


def place(scene: StampScene, names: tuple[str, ...], rng: np.random.Generator) -> Question | None:
    """What is at the left, right, top or bottom? The outermost of at least two things."""
    edge = str(rng.choice([*EDGES]))
    thing = outermost(scene, edge)
    if thing is None:
        return None
    return named("place", f"What is at the {edge}?", thing.name, scene, names, rng)


def outermost(scene: StampScene, edge: str) -> Stamp | None:
    """The thing clearly nearest to an edge of the picture, of at least two."""
    axis, sign = EDGES[edge]
    order = sorted(scene.things, key=lambda t: -sign * t.center[axis])
    if len(order) < 2 or sign * (order[0].center[axis] - order[1].center[axis]) < MARGIN:
        return None
    return order[0]


def near(scene: StampScene, names: tuple[str, ...], rng: np.random.Generator) -> Question | None:
    """What is next to the X? The nearest of at least two other things."""
    if len(scene.things) < 3:
        return None
    thing = pick(scene.things, rng)

    def distance(other: Stamp) -> float:
        return float(np.hypot(*np.subtract(other.center, thing.center)))

    order = sorted((t for t in scene.things if t is not thing), key=distance)
    if distance(order[1]) < NEARER * distance(order[0]):
        return None
    text = f"What is next to the {thing.name}?"
    question = named("near", text, order[0].name, scene, names, rng)
    return None if thing.name == order[0].name else question


def size(scene: StampScene, names: tuple[str, ...], rng: np.random.Generator) -> Question | None:
    """Which is the biggest, or the smallest, thing? By the area of its box."""
    if len(scene.things) < 2:
        return None
    order = sorted(scene.things, key=lambda t: t.area)
    word = "biggest" if rng.random() < 0.5 else "smallest"
    first, second = (order[-1], order[-2]) if word == "biggest" else (order[1], order[0])
    if first.area < LARGER * second.area:
        return None
    answer = (first if word == "biggest" else second).name
    return named("size", f"What is the {word} thing?", answer, scene, names, rng)


def count(scene: StampScene, names: tuple[str, ...], rng: np.random.Generator) -> Question | None:
    """How many things are there? One to four; a word is no thing."""
    if not scene.things:
        return None
    answer = COUNTS[len(scene.things) - 1]
    return Question("count", "How many things are there?", answer, COUNTS)


def reading(scene: StampScene, names: tuple[str, ...], rng: np.random.Generator) -> Question | None:
    """What does the text say?"""
    if len(scene.texts) != 1:
        return None
    answer = scene.texts[0].text
    return Question("reading", "What does the text say?", answer, draw_options(answer, WORDS, rng))


FAMILIES: dict[str, Asker] = {
    "name": naming,
    "existence": existence,
    "half": half,
    "place": place,
    "near": near,
    "size": size,
    "count": count,
    "reading": reading,
}
