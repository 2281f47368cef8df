"""Clips of StampsQA: photographs that appear, leave and move before a camera that pans or zooms."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from PIL import Image

from recipes.photographs.grounds import draw_ground, plain_ground
from recipes.photographs.scenes import Library, Stamp, StampScene, place, scaled
from tokencomp.zoo.shapesqa.scenes import DIRECTIONS

SIZE = 224  # px, both sides of the picture before the camera
RATE = 8  # frames per second
SECONDS = 32  # of a clip whose length is not given
MOMENT = 1.0  # seconds for which a thing is visible that is shown for a moment
VIEW = 0.8  # share of the picture's width that a camera shows that pans, or that has zoomed in
SLACK = (1 - VIEW) * SIZE  # px that it does not show
SIDES = (44.0, 80.0)  # px, the longer side of a thing
PATHS = (50, 90)  # px that a moving thing covers in the whole clip
CAMERAS = ("zooms in", "zooms out", "pans left", "pans right")
STILL = "stands still"
STILL_SHARE = 0.4
ACTS = {"stays": 0.3, "appears": 0.2, "leaves": 0.2, "moment": 0.15, "moves": 0.15}


@dataclass(frozen=True)
class Act:
    """What a thing does: visible from ``start`` to ``end`` (s), moved by ``path`` (px) in all."""

    start: float
    end: float
    path: tuple[int, int] = (0, 0)

    @property
    def direction(self) -> str | None:
        """Name of the direction; None at rest."""
        signs = tuple(int(np.sign(step)) for step in self.path)
        return next((name for name, unit in DIRECTIONS.items() if unit == signs), None)


@dataclass(frozen=True)
class ClipScene:
    """A picture whose things act, seen by a camera.

    Attributes
    ----------
    picture
        All things, where they are at the start.
    acts
        What each of them does.
    camera
        One of `CAMERAS`, or `STILL`. It moves over the picture with all things.
    seconds
        Length of the clip.
    grain
        Standard deviation of the noise in every frame, in [0, 255].
    """

    picture: StampScene
    acts: tuple[Act, ...]
    camera: str
    seconds: float
    grain: float

    @property
    def frames(self) -> int:
        return round(self.seconds * RATE)

    def view(self, time: float) -> tuple[float, float, float]:
        """Left, top and side of what the camera shows of the picture, in px."""
        done = time / self.seconds
        if self.camera == STILL:
            return 0.0, 0.0, float(SIZE)
        if self.camera in ("zooms in", "zooms out"):
            cut = SLACK * (done if self.camera == "zooms in" else 1 - done)
            return cut / 2, cut / 2, SIZE - cut
        return SLACK * (done if self.camera == "pans right" else 1 - done), SLACK / 2, VIEW * SIZE

    def seen(self, number: int) -> list[int]:
        """Frames that show thing ``number``."""
        act = self.acts[number]
        return [k for k in range(self.frames) if act.start <= k / RATE < act.end]


def in_view(camera: str) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of the part of the picture that a camera always shows, in px."""
    x, y = {STILL: (0.0, 0.0), "zooms in": (SLACK / 2,) * 2, "zooms out": (SLACK / 2,) * 2}.get(
        camera, (SLACK, SLACK / 2)
    )
    return int(np.ceil(x)), int(np.ceil(y)), int(SIZE - x), int(SIZE - y)


def sample_clip(
    rng: np.random.Generator, library: Library, split: str, seconds: float = SECONDS
) -> ClipScene:
    """A random clip. Things do not overlap at any time, and are in view whenever they are visible.

    Things move in front of a still camera alone, so that a direction has one meaning.
    """
    camera = STILL if rng.random() < STILL_SHARE else str(rng.choice(CAMERAS))
    area, things, swept, acts = in_view(camera), [], [], []
    for name in rng.permutation(library.names)[: int(rng.integers(2, 5))]:
        thing = place(rng, library, str(name), swept, split, SIDES, area)
        if thing is None:
            continue
        kind = str(rng.choice([*ACTS], p=[*ACTS.values()]))
        act = _act(rng, kind, seconds)
        way = thing
        if kind == "moves" and camera == STILL:
            act, way = _moved(rng, thing, swept, act)
        things.append(thing)
        swept.append(way)
        acts.append(act)
    ground = plain_ground(rng, library, split, 0.6)
    grain = 0.0 if rng.random() < 0.5 else float(rng.uniform(1, 4))
    picture = StampScene(split, tuple(things), ground)
    return ClipScene(picture, tuple(acts), camera, seconds, grain)


def _act(rng: np.random.Generator, kind: str, seconds: float) -> Act:
    time = round(float(rng.uniform(0.1, 0.9)) * seconds * RATE) / RATE
    if kind == "appears":
        return Act(time, seconds)
    if kind == "leaves":
        return Act(0.0, time)
    if kind == "moment":
        return Act(time, min(time + MOMENT, seconds - 1 / RATE))
    return Act(0.0, seconds)


def _moved(
    rng: np.random.Generator, thing: Stamp, swept: list[Stamp], act: Act
) -> tuple[Act, Stamp]:
    """The act with a free path, and the box of all that the thing covers; as it was if none is."""
    for name in rng.permutation([*DIRECTIONS]):
        length = int(rng.integers(*PATHS))
        x, y = (round(unit * length) for unit in DIRECTIONS[str(name)])
        left, top = thing.left + min(x, 0), thing.top + min(y, 0)
        way = replace(
            thing, left=left, top=top, width=thing.width + abs(x), height=thing.height + abs(y)
        )
        right, bottom = left + way.width, top + way.height
        inside = min(left, top) >= 0 and max(right, bottom) <= SIZE
        if inside and not any(t.overlaps(left, top, right, bottom) for t in swept):
            return replace(act, path=(x, y)), way
    return act, thing


def clip_frames(scene: ClipScene, library: Library, size: int) -> Iterator[np.ndarray]:
    """Frames, uint8 (size, size, 3), `RATE` per second."""
    factor = size / (SIZE if scene.camera == STILL else VIEW * SIZE)
    picture = scene.picture
    ground = draw_ground(picture.ground, library, picture.split, round(SIZE * factor))
    photos = [scaled(thing, library, factor) for thing in picture.things]
    rng = np.random.default_rng([picture.ground.number, scene.frames])

    @cache
    def composed(places: tuple[tuple[int, int, int], ...]) -> Image.Image:
        picture = ground.copy()
        for number, left, top in places:
            picture.paste(photos[number], (left, top), photos[number])
        return picture

    for k in range(scene.frames):
        picture = composed(tuple(_places(scene, k / RATE, factor)))
        left, top, side = (value * factor for value in scene.view(k / RATE))
        box = (left, top, min(left + side, picture.width), min(top + side, picture.height))
        pixels = np.asarray(picture.resize((size, size), Image.Resampling.BILINEAR, box))
        if scene.grain:
            noise = rng.standard_normal((size, size, 1), np.float32) * scene.grain
            pixels = np.clip(np.rint(pixels + noise), 0, 255).astype(np.uint8)
        yield pixels


def _places(scene: ClipScene, time: float, factor: float) -> Iterator[tuple[int, int, int]]:
    """Number, left and top (px of the composed picture) of every visible thing."""
    pairs = zip(scene.picture.things, scene.acts, strict=True)
    for number, (thing, act) in enumerate(pairs):
        if act.start <= time < act.end:
            x, y = (step * time / scene.seconds for step in act.path)
            yield number, round((thing.left + x) * factor), round((thing.top + y) * factor)
