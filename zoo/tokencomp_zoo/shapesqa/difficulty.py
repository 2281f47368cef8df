"""Scenes by difficulty: drawings in flat colours, the usual scenes, and harder ones.

`plain` scenes are simple drawings: one to three shapes in flat colours on a flat ground, of any
size and aspect ratio. `hard` has backgrounds in the colours of objects, more objects, cameras that
pan behind the objects and noise in every frame, all of which is hard for methods that score pixels.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from tokencomp.errors import unknown_name
from tokencomp.zoo.shapesqa.questions import IMAGE_FAMILIES
from tokencomp.zoo.shapesqa.scenes import (
    COLORS,
    SHAPES,
    Look,
    Placer,
    Scene,
    draw_size,
    image_scene,
    video_scene,
    with_text,
)

DIFFICULTIES = ("plain", "usual", "hard")
PLAIN = ("attribute", "existence", "count", "position")
"""The question families that plain drawings have."""
SIZE = (224, 224)  # px, of scenes whose size is not given
SIDES = (160, 900)  # px, of plain drawings whose size is not given
# Flat colours by name, as drawing programs and style sheets have them.
FLAT = {
    "red": ((255, 0, 0), (220, 20, 60)),
    "orange": ((255, 165, 0), (255, 140, 0)),
    "yellow": ((255, 255, 0), (255, 215, 0)),
    "green": ((0, 128, 0), (0, 255, 0), (0, 170, 0)),
    "cyan": ((0, 255, 255), (0, 206, 209)),
    "blue": ((0, 0, 255), (30, 80, 255)),
    "purple": ((128, 0, 128), (148, 0, 211)),
    "pink": ((255, 192, 203), (255, 105, 180)),
}
GREYS = ((255, 255, 255), (0, 0, 0), (128, 128, 128), (211, 211, 211), (64, 64, 64))


def is_image_family(family: str) -> bool:
    """Whether questions of ``family`` are about still pictures."""
    return family in (*IMAGE_FAMILIES, "reading")


def sample_scene(
    rng: np.random.Generator,
    family: str,
    size: tuple[int, int] | None = None,
    frames: int = 8,
    difficulty: str = "usual",
) -> Scene:
    """One scene for a question of ``family``; the other arguments are those of `items.item`.

    The family decides between image and video, on the share of small objects, and on text.
    """
    if difficulty not in DIFFICULTIES:
        raise unknown_name("difficulty", difficulty, DIFFICULTIES)
    if difficulty == "plain":
        if family not in PLAIN:
            raise unknown_name("question family of plain drawings", family, PLAIN)
        return plain_scene(rng, size or _random_size(rng))
    width, height = size or SIZE
    if not is_image_family(family):
        make = hard_video if difficulty == "hard" else video_scene
        return make(rng, width, height, frames)
    small = 0.6 if family == "small_object" else 0.3
    if difficulty == "hard":
        return hard_image(rng, width, height, small, text=family == "reading")
    scene = image_scene(rng, width, height, small=small)
    return with_text(scene, rng) if family == "reading" else scene


def _random_size(rng: np.random.Generator) -> tuple[int, int]:
    """Width and height in pixels, at most 2.5 to 1, evenly spread on a logarithmic scale."""
    low, high = np.log(SIDES)
    width = float(np.exp(rng.uniform(low, high)))
    height = float(np.clip(width * np.exp(rng.uniform(-np.log(2.5), np.log(2.5))), *SIDES))
    return round(width), round(height)


def plain_scene(rng: np.random.Generator, size: tuple[int, int]) -> Scene:
    """One to three shapes in flat colours on a ground of one other flat colour."""
    width, height = size
    ground = str(rng.choice([*COLORS, *["grey"] * len(COLORS)]))
    shades = GREYS if ground == "grey" else FLAT[ground]
    names = [color for color in COLORS if color != ground]
    placer = Placer(rng, width, height, 1)
    for _ in range(int(rng.integers(1, 4))):
        color = str(rng.choice(names))
        rgb = FLAT[color][int(rng.integers(len(FLAT[color])))]
        side = max(26, round(min(size) * rng.uniform(0.12, 0.6)))
        placer.place(shape=str(rng.choice(SHAPES)), color=color, size=side, rgb=rgb)
    if not placer.things:
        placer.place(shape="circle", color=names[0], size=26, rgb=FLAT[names[0]][0])
    flat = shades[int(rng.integers(len(shades)))]
    return Scene(width, height, 1, tuple(placer.things), int(rng.integers(2**31)), look=Look(flat))


def hard_image(
    rng: np.random.Generator, width: int, height: int, small: float, text: bool = False
) -> Scene:
    """Four to nine objects before a background in their own colours, in noise."""
    placer = Placer(rng, width, height, 1)
    shapes, colors = rng.permutation(SHAPES)[:5], rng.permutation(COLORS)[:5]
    for _ in range(int(rng.integers(4, 10))):
        shape, color = str(rng.choice(shapes)), str(rng.choice(colors))
        placer.place(shape=shape, color=color, size=draw_size(rng, small))
    look = Look(vivid=True, grain=float(rng.uniform(0, 8)))
    scene = Scene(width, height, 1, tuple(placer.things), int(rng.integers(2**31)), look=look)
    return with_text(scene, rng) if text else scene


def hard_video(rng: np.random.Generator, width: int, height: int, frames: int) -> Scene:
    """The usual clip before a background that pans, in the colours of objects, in noise."""
    scene = video_scene(rng, width, height, frames)
    speed = rng.uniform(3, 12) * 8 / frames
    angle = rng.uniform(0, 2 * np.pi)
    look = Look(
        vivid=bool(rng.random() < 0.5),
        pan=(float(speed * np.cos(angle)), float(speed * np.sin(angle))),
        grain=float(rng.uniform(0, 8)),
    )
    return replace(scene, look=look)
