"""Scenes of ShapesQA: which objects there are, where they stand and when they are visible.

A scene is plain data. Rendering (:mod:`.render`) and questions (:mod:`.questions`) both read it and
know nothing of each other, so an answer can be derived again from the scene alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from tokencomp.zoo.shapesqa.lettering import Text, place_text

SHAPES = ("circle", "square", "triangle", "diamond", "cross", "star", "ring")
COLORS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
SMALL = (16, 24)  # px, below one merged token (28 px) of the embedded models
MEDIUM = (28, 40)
LARGE = (42, 62)
MARGIN = 4  # px between two objects


@dataclass(frozen=True)
class Thing:
    """One coloured shape.

    ``x``, ``y`` are the top-left corner at time 0 and ``size`` the side of the bounding box, all in
    pixels. ``velocity`` is in pixels per time unit; one time unit is one *logical frame*.
    ``visible`` holds half-open time intervals; empty means always visible.
    """

    shape: str
    color: str
    size: int
    x: float
    y: float
    velocity: tuple[float, float] = (0.0, 0.0)
    visible: tuple[tuple[float, float], ...] = ()
    tint: tuple[float, float, float] = (0.0, 0.0, 0.0)
    rgb: tuple[int, int, int] | None = None
    """Flat colour; None is the named colour, slightly varied by ``tint``."""

    @property
    def small(self) -> bool:
        return self.size <= SMALL[1]

    @property
    def moving(self) -> bool:
        return self.velocity != (0.0, 0.0)

    @property
    def direction(self) -> str | None:
        """Name of the direction of movement, or None for a thing at rest."""
        signs = tuple(int(np.sign(v)) for v in self.velocity)
        return next((name for name, unit in DIRECTIONS.items() if unit == signs), None)

    @property
    def brief(self) -> bool:
        """Visible in exactly one interval of one logical frame."""
        return len(self.visible) == 1 and self.visible[0][1] - self.visible[0][0] <= 1

    def visible_at(self, time: float) -> bool:
        return not self.visible or any(start <= time < end for start, end in self.visible)

    def box(self, time: float = 0.0) -> tuple[int, int, int, int]:
        """Bounding box (left, top, right, bottom) in pixels at ``time``."""
        left = round(self.x + self.velocity[0] * time)
        top = round(self.y + self.velocity[1] * time)
        return left, top, left + self.size, top + self.size

    def center(self, time: float = 0.0) -> tuple[float, float]:
        left, top, right, bottom = self.box(time)
        return (left + right) / 2, (top + bottom) / 2

    def sweep(self, frames: int) -> tuple[int, int, int, int]:
        """Bounding box of everything the thing covers over the whole clip."""
        first, last = self.box(0.0), self.box(float(frames))
        low = np.minimum(first[:2], last[:2])
        high = np.maximum(first[2:], last[2:])
        return int(low[0]), int(low[1]), int(high[0]), int(high[1])


@dataclass(frozen=True)
class Look:
    """How a scene is drawn, apart from its objects.

    ``flat`` is one background colour instead of a texture; ``vivid`` textures have the colours of
    objects; the background moves by ``pan`` pixels per time unit, as behind a camera that follows
    the objects; ``grain`` is noise of each frame, as standard deviation in grey levels.
    """

    flat: tuple[int, int, int] | None = None
    vivid: bool = False
    pan: tuple[float, float] = (0.0, 0.0)
    grain: float = 0.0


@dataclass(frozen=True)
class Scene:
    """What one image (``frames == 1``) or one video shows.

    ``background`` seeds the background alone, so that it does not depend on the objects.
    """

    width: int
    height: int
    frames: int
    things: tuple[Thing, ...]
    background: int = 0
    texts: tuple[Text, ...] = ()
    look: Look = Look()

    @property
    def kind(self) -> str:
        return "image" if self.frames == 1 else "video"

    def visible_at(self, time: float) -> list[Thing]:
        return [thing for thing in self.things if thing.visible_at(time)]


def _overlaps(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> bool:
    gap = MARGIN
    return a[0] < b[2] + gap and b[0] < a[2] + gap and a[1] < b[3] + gap and b[1] < a[3] + gap


class Placer:
    """Puts things at free positions that never overlap, also while they move."""

    def __init__(self, rng: np.random.Generator, width: int, height: int, frames: int):
        self.rng, self.width, self.height, self.frames = rng, width, height, frames
        self.things: list[Thing] = []

    def place(self, **fields) -> bool:
        """Try to add a thing; False when no free position was found."""
        for _ in range(40):
            size, (dx, dy) = fields["size"], fields.get("velocity", (0.0, 0.0))
            travel = (dx * self.frames, dy * self.frames)
            low = [max(2.0, 2.0 - t) for t in travel]
            high = [
                side - size - 2.0 - max(0.0, t)
                for side, t in zip((self.width, self.height), travel, strict=True)
            ]
            if high[0] <= low[0] or high[1] <= low[1]:
                return False
            x, y = (float(np.round(self.rng.uniform(a, b))) for a, b in zip(low, high, strict=True))
            thing = Thing(x=x, y=y, tint=tuple(self.rng.uniform(-1, 1, 3).round(3)), **fields)
            box = thing.sweep(self.frames)
            if not any(_overlaps(box, other.sweep(self.frames)) for other in self.things):
                self.things.append(thing)
                return True
        return False


def draw_size(rng: np.random.Generator, small: float = 0.3) -> int:
    kind = rng.random()
    low, high = SMALL if kind < small else MEDIUM if kind < 0.5 + small / 2 else LARGE
    return int(rng.integers(low, high + 1))


def image_scene(
    rng: np.random.Generator,
    width: int = 224,
    height: int = 224,
    objects: tuple[int, int] = (2, 5),
    small: float = 0.3,
) -> Scene:
    """Sample a still scene with 2 to 5 objects at free positions and several scales.

    Half of the scenes may repeat shapes and colours, which makes counting and existence hard; the
    other half never do, which makes every object addressable by one word.
    """
    count = int(rng.integers(objects[0], objects[1] + 1))
    distinct = rng.random() < 0.5
    shapes = rng.permutation(len(SHAPES))[:count] if distinct else rng.integers(0, 5, count)
    colors = rng.permutation(len(COLORS))[:count] if distinct else rng.integers(0, 5, count)
    if not distinct:  # a random subset of words, so that repeats are likely but not fixed words
        shapes = rng.permutation(len(SHAPES))[shapes]
        colors = rng.permutation(len(COLORS))[colors]
    placer = Placer(rng, width, height, 1)
    sizes = sorted((draw_size(rng, small) for _ in range(count)), reverse=True)
    for shape, color, size in zip(shapes, colors, sizes, strict=True):
        placer.place(shape=SHAPES[shape], color=COLORS[color], size=size)
    return Scene(width, height, 1, tuple(placer.things), int(rng.integers(2**31)))


def with_text(
    scene: Scene, rng: np.random.Generator, count: int = 1, numbers: float = 1 / 3
) -> Scene:
    """The scene with up to ``count`` words at free places; a share of ``numbers`` are numbers."""
    taken = [thing.sweep(scene.frames) for thing in scene.things]
    texts: list[Text] = []
    for _ in range(count):
        text = place_text(rng, scene.width, scene.height, taken, numbers=numbers)
        if text is not None:
            texts.append(text)
            taken.append(text.box)
    return replace(scene, texts=tuple(texts))


def video_scene(
    rng: np.random.Generator, width: int = 224, height: int = 224, frames: int = 8
) -> Scene:
    """Sample a clip: one or two lasting objects, a mover, flashes and brief needles.

    All objects differ in shape and in colour, so that each is addressable by one word. Objects that
    come and go are visible for single logical frames, and no two of them within two frames.
    """
    shapes, colors = rng.permutation(len(SHAPES)), rng.permutation(len(COLORS))
    names = iter(zip(shapes, colors, strict=False))
    placer = Placer(rng, width, height, frames)

    def add(**fields) -> bool:
        shape, color = next(names)
        size = int(rng.integers(24, 50))
        return placer.place(shape=SHAPES[shape], color=COLORS[color], size=size, **fields)

    if rng.random() < 0.6:
        unit = DIRECTIONS[str(rng.choice(list(DIRECTIONS)))]
        speed = rng.uniform(70, 120) / frames
        add(velocity=(float(unit[0] * speed), float(unit[1] * speed)))
    slots = _time_slots(rng, frames)
    if rng.random() < 0.6:
        flashes = int(rng.integers(1, 5))
        parity = int(rng.integers(2))
        groups = np.sort(rng.permutation(frames // 2)[:flashes])
        add(visible=tuple((float(2 * g + parity), float(2 * g + parity + 1)) for g in groups))
    for start in slots[: int(rng.integers(1, 4))]:
        add(visible=((float(start), float(start + 1)),))
    for _ in range(int(rng.integers(0, 3))):
        add()
    if not placer.things:
        add()
    things = tuple(placer.things[i] for i in rng.permutation(len(placer.things)))
    return Scene(width, height, frames, things, int(rng.integers(2**31)))


def _time_slots(rng: np.random.Generator, frames: int) -> list[int]:
    """Start times of brief things: one per pair of frames, so that no two are neighbours."""
    pairs = rng.permutation(frames // 2)
    parity = int(rng.integers(2))
    return [int(2 * p + parity) for p in pairs]
