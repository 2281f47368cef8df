"""Scenes of the questions with long answers, and the facts that answer them.

Five families: objects of a picture described in reading order, counted aloud, a page read word by
word, a clip followed second by second, and two pictures compared. Objects have a place in a grid of
four rows and three columns, no two the same.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from tokencomp.inputs.video import Video
from tokencomp.zoo.shapesqa.facts import PLACES, ROWS, SIDES, SUM, VERBS, Fact, write
from tokencomp.zoo.shapesqa.items import stream
from tokencomp.zoo.shapesqa.lettering import FONTS, WORDS, Text, extent
from tokencomp.zoo.shapesqa.questions import PLURALS
from tokencomp.zoo.shapesqa.scenes import (
    COLORS,
    DIRECTIONS,
    MARGIN,
    SHAPES,
    SMALL,
    Look,
    Scene,
    Thing,
)

FAMILIES = ("describe", "count", "read", "follow", "compare")
LARGE = (34, 50)  # px; small objects are those of the short questions
EVENT = (24, 32)  # px a side of an object in a clip
SPEED = (8.0, 12.0)  # px in half a second
EDGE = 5  # px between the middle of an object and the border of its place
SIDE, CLIP_SIDE = (224, 280), 168  # px
FRAMES = (8, 16, 24, 32)  # two a second
PAPER = (190, 256)  # grey levels
LETTERS = (20, 27)  # px
TRIES = 30

QUESTIONS = {
    "describe": "Describe every object, from the top left to the bottom right.",
    "count": "Count the {}, step by step.",
    "read": "Read the text, word by word.",
    "follow": "Tell what happens, second by second.",
    "compare": "Tell what is new in the second image.",
}


@dataclass(frozen=True)
class LongItem:
    """One question with a long answer; pixels are rendered on demand.

    `scenes` is one picture or clip, or two pictures that are compared.
    """

    id: str
    family: str
    scenes: tuple[Scene, ...]
    question: str
    facts: tuple[Fact, ...]

    @property
    def kind(self) -> str:
        """ "image" or "video"."""
        return self.scenes[0].kind

    @property
    def answer(self) -> str:
        return write(self.family, self.facts)

    def media(self) -> tuple[Image.Image | Video, ...]:
        """The pictures, or the clip with its frames at the times they have in a file."""
        from tokencomp.zoo.shapesqa.render import FPS, HOLD, render

        if self.kind == "image":
            return tuple(Image.fromarray(render(scene)[0]) for scene in self.scenes)
        (scene,) = self.scenes
        frames = render(scene, [k + 0.5 for k in range(scene.frames)])
        at = [HOLD * k + HOLD // 2 for k in range(scene.frames)]
        video = Video([Image.fromarray(frame) for frame in frames], FPS, at, HOLD * scene.frames)
        return (video,)


def item(split: str, family: str, index: int) -> LongItem:
    """Question `index` of a family, a pure function of its arguments.

    Parameters
    ----------
    split : {"train", "validation", "test"}
    family : str
        One of `FAMILIES`.
    """
    rng = stream(split, "long", family, index)
    if family == "follow":
        shape = int(rng.choice(FRAMES)), CLIP_SIDE, CLIP_SIDE
    else:
        side = SIDE[1] if family == "read" else int(rng.choice(SIDE))
        shape = 1, side, side
    scenes, question, facts = draw(family, rng, shape)
    return LongItem(f"{split}-{family}-{index:05d}", family, scenes, question, facts)


Drawn = tuple[tuple[Scene, ...], str, tuple[Fact, ...]]


def draw(
    family: str, rng: np.random.Generator, shape: tuple[int, int, int], most: int = 12
) -> Drawn:
    """Scenes of (frames, height, width), a question about them and the facts that answer it.

    `most` is the largest number of objects, of changes times two, or half of the words.
    """
    if family == "describe":
        scene = picture(rng, shape, most)
        return (scene,), QUESTIONS[family], described(scene)
    if family == "count":
        scene = picture(rng, shape, most)
        word = str(rng.choice(counted_words(scene)))
        return (scene,), *counted(scene, word)
    if family == "read":
        scene = page(rng, shape, most)
        return (
            (scene,),
            QUESTIONS[family],
            tuple(Fact(str(k), text.text) for k, text in enumerate(scene.texts)),
        )
    if family == "follow":
        return clip(rng, shape)
    return pair(rng, shape, most)


# Pictures


def picture(rng: np.random.Generator, shape: tuple[int, int, int], most: int) -> Scene:
    """Three to `most` objects, each in a place of its own, in two to eight colours."""
    _, height, width = shape
    colors = rng.permutation(COLORS)[: int(rng.integers(2, len(COLORS) + 1))]
    shapes = rng.permutation(SHAPES)[: int(rng.integers(2, len(SHAPES) + 1))]
    count = int(rng.integers(3, most + 1))
    things: list[Thing] = []
    for number in rng.permutation(len(PLACES))[:count]:
        small = bool(rng.random() < 0.4)
        size = int(rng.integers(*(SMALL if small else LARGE)))
        _put(rng, things, int(number), size, width, height, colors, shapes)
    things.sort(key=lambda thing: place_number(thing.center(), width, height))
    return Scene(width, height, 1, tuple(things), int(rng.integers(2**31)))


def place_number(center: tuple[float, float], width: int, height: int) -> int:
    """Index into `PLACES` of a point in pixels."""
    column, row = int(center[0] * len(SIDES) / width), int(center[1] * len(ROWS) / height)
    return row * len(SIDES) + column


def _place(thing: Thing, scene: Scene) -> str:
    return PLACES[place_number(thing.center(), scene.width, scene.height)]


def _put(
    rng: np.random.Generator,
    things: list[Thing],
    place: int,
    size: int,
    width: int,
    height: int,
    colors: np.ndarray,
    shapes: np.ndarray,
) -> bool:
    """Add a thing whose middle lies in a place, if there is room."""
    for _ in range(TRIES):
        x, y = _middle(rng, place, size / 2 + 2, width, height)
        thing = Thing(
            str(rng.choice(shapes)),
            str(rng.choice(colors)),
            size,
            float(round(x - size / 2)),
            float(round(y - size / 2)),
            tint=_tint(rng),
        )
        box = thing.box()
        if all(_apart(box, other.box()) for other in things):
            things.append(thing)
            return True
    return False


def _tint(rng: np.random.Generator) -> tuple[float, float, float]:
    a, b, c = rng.uniform(-1, 1, 3).round(3).tolist()
    return a, b, c


def _apart(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> bool:
    gap = MARGIN
    return a[0] > b[2] + gap or b[0] > a[2] + gap or a[1] > b[3] + gap or b[1] > a[3] + gap


def _middle(
    rng: np.random.Generator, place: int, reach: float, width: int, height: int
) -> tuple[float, float]:
    """A point in a place, `reach` or more from the borders of the picture."""
    row, column = divmod(place, len(SIDES))
    out = []
    for number, parts, side in ((column, len(SIDES), width), (row, len(ROWS), height)):
        low = max(number * side / parts + EDGE, reach)
        high = min((number + 1) * side / parts - EDGE, side - reach)
        out.append(float(rng.uniform(low, high)))
    return out[0], out[1]


def _size(thing: Thing) -> str:
    return "small" if thing.small else "large"


def _named(thing: Thing) -> str:
    return f"{_size(thing)} {thing.color} {thing.shape}"


def described(scene: Scene) -> tuple[Fact, ...]:
    """Every object of a picture, in reading order."""
    return tuple(Fact(_place(thing, scene), _named(thing)) for thing in scene.things)


def counted_words(scene: Scene) -> list[str]:
    """Colours and shapes that can be counted: those of two objects or more weigh three times."""
    words = [word for thing in scene.things for word in (thing.color, thing.shape)]
    return [w for w in sorted(set(words)) for _ in range(3 if words.count(w) > 1 else 1)]


def counted(scene: Scene, word: str) -> tuple[str, tuple[Fact, ...]]:
    """The question that counts the objects of a colour or a shape, and its facts."""
    facts = tuple(
        Fact(_place(thing, scene), _named(thing))
        for thing in scene.things
        if word in (thing.color, thing.shape)
    )
    name = f"{word} objects" if word in COLORS else PLURALS[word]
    return QUESTIONS["count"].format(name), (*facts, Fact(SUM, str(len(facts))))


# Pages


def page(rng: np.random.Generator, shape: tuple[int, int, int], most: int) -> Scene:
    """Lines of two or three words, all different; up to twice `most` words."""
    _, height, width = shape
    lines = int(rng.integers(2, min(most * 2 // 3, height // 33) + 1))
    pitch = (height - 12) / lines
    font, dark = str(rng.choice(FONTS)), bool(rng.random() < 0.5)
    size = int(rng.integers(*LETTERS))
    words = iter(rng.permutation(WORDS).tolist())
    texts: list[Text] = []
    for line in range(lines):
        columns = int(rng.integers(2, 4))
        y = 6 + line * pitch + float(rng.uniform(0, max(0.0, pitch - size - 6)))
        slot = (width - 8) / columns
        for column in range(columns):
            word = next(words)
            wide, _ = extent(word, size, font)
            x = 4 + column * slot + float(rng.uniform(0, slot - wide - 8))
            texts.append(Text(word, round(x), round(y), size, font, dark))
    grey = int(rng.integers(*PAPER)) if dark else int(rng.integers(0, 70))
    look = Look(flat=(grey, grey, grey)) if rng.random() < 0.7 else Look()
    return Scene(width, height, 1, (), int(rng.integers(2**31)), tuple(texts), look)


# Clips


def clip(rng: np.random.Generator, shape: tuple[int, int, int]) -> Drawn:
    """A clip in which one thing happens in most seconds."""
    frames, height, width = shape
    things: list[Thing] = []
    facts = []
    for second in range(frames // 2):
        if rng.random() < 0.2 and (facts or second + 1 < frames // 2):
            continue
        place, verb = int(rng.integers(len(PLACES))), str(rng.choice(VERBS))
        things.append(_event(rng, place, verb, second, width, height))
        said = f"{PLACES[place]}: the {things[-1].color} {things[-1].shape} {verb}"
        facts.append(Fact(str(second), said))
    scene = Scene(width, height, frames, tuple(things), int(rng.integers(2**31)))
    return (scene,), QUESTIONS["follow"], tuple(facts)


def _event(
    rng: np.random.Generator, place: int, verb: str, second: int, width: int, height: int
) -> Thing:
    """An object seen in one second alone, which moves, flashes for half of it, or stays.

    Its place is where it is in the middle of the second, at time 2·`second` + 1 in frames.
    """
    size, start = int(rng.integers(*EVENT)), 2.0 * second
    speed = float(rng.uniform(*SPEED)) if verb.startswith("moves") else 0.0
    unit = DIRECTIONS[verb.split()[-1]] if speed else (0, 0)
    vx, vy = speed * unit[0], speed * unit[1]
    half = float(rng.integers(2))
    seen = (start + half, start + half + 1) if verb == "flashes" else (start, start + 2)
    x, y = _middle(rng, place, size / 2 + speed + 2, width, height)
    return Thing(
        str(rng.choice(SHAPES)),
        str(rng.choice(COLORS)),
        size,
        round(x - size / 2) - vx * (start + 1),
        round(y - size / 2) - vy * (start + 1),
        velocity=(vx, vy),
        visible=(seen,),
        tint=_tint(rng),
    )


# Pairs


def pair(rng: np.random.Generator, shape: tuple[int, int, int], most: int) -> Drawn:
    """Two pictures; in the second, one to half of `most` objects are gone, new or changed."""
    first = picture(rng, shape, max(3, most - 2))
    places = [place_number(t.center(), first.width, first.height) for t in first.things]
    second = list(first.things)
    facts: dict[int, str] = {}
    changes = int(rng.integers(1, most // 2 + 1))
    for number in rng.permutation(len(PLACES)):
        place = int(number)
        if len(facts) == changes:
            break
        if place in places:
            thing = first.things[places.index(place)]
            said, changed = _change(rng, thing)
            second[second.index(thing) : second.index(thing) + 1] = changed
            facts[place] = said
        elif rng.random() < 0.5:
            size = int(rng.integers(*(SMALL if rng.random() < 0.4 else LARGE)))
            width, height = first.width, first.height
            every = np.asarray(COLORS), np.asarray(SHAPES)
            if _put(rng, second, place, size, width, height, *every):
                facts[place] = f"the {second[-1].color} {second[-1].shape} is new"
    said = tuple(Fact(PLACES[place], facts[place]) for place in sorted(facts))
    return (first, replace(first, things=tuple(second))), QUESTIONS["compare"], said


def _change(rng: np.random.Generator, thing: Thing) -> tuple[str, list[Thing]]:
    """What is said of a change, and what the second picture has for the thing."""
    kind, name = rng.random(), f"the {thing.color} {thing.shape} is"
    if kind < 0.34:
        return f"{name} gone", []
    if kind < 0.67:
        color = str(rng.choice([c for c in COLORS if c != thing.color]))
        return f"{name} now {color}", [replace(thing, color=color)]
    shape = str(rng.choice([s for s in SHAPES if s != thing.shape]))
    return f"{name} now a {shape}", [replace(thing, shape=shape)]
