"""Scenes that only training has: crowds, brief objects, acts and pages of words."""

from __future__ import annotations

import numpy as np

from tokencomp.zoo.shapesqa.difficulty import FLAT, GREYS, hard_image, hard_video, plain_scene
from tokencomp.zoo.shapesqa.scenes import (
    COLORS,
    DIRECTIONS,
    SHAPES,
    Look,
    Placer,
    Scene,
    draw_size,
    image_scene,
    video_scene,
    with_text,
)

BACKGROUNDS = 600  # textures of training scenes: drawn once each, then taken from a cache


def training_scene(
    rng: np.random.Generator,
    kind: str,
    shape: tuple[int, int, int],
    objects: tuple[int, int],
    text: float,
) -> Scene:
    """One scene of (frames, height, width).

    Parameters
    ----------
    kind : {"usual", "plain", "hard", "crowd", "brief", "acts", "page", "numbers"}
        "usual", "plain" and "hard" are the scenes of the benchmark. The others:

        - "crowd": as many ``objects`` as find room, in one frame, or in two between which they
          move, come and go.
        - "brief": four to six objects, each in one frame of a video.
        - "acts": two or three objects that move, and as many that flash one to four times.
        - "page": four to ten words and numbers; "numbers": the same, three in four are numbers.
    text : float
        Share of images with one word or number.
    """
    frames, height, width = shape
    if kind in ("page", "numbers"):
        scene = Scene(width, height, 1, (), int(rng.integers(BACKGROUNDS)), look=_ground(rng))
        share = 3 / 4 if kind == "numbers" else 1 / 3
        return with_text(scene, rng, int(rng.integers(4, 11)), share)
    if kind == "crowd":
        scene = _crowd(rng, width, height, frames, objects)
    elif kind == "brief":
        scene = _brief(rng, width, height, frames)
    elif kind == "acts":
        scene = _acts(rng, width, height, frames)
    elif frames > 1:
        make = hard_video if kind == "hard" else video_scene
        scene = make(rng, width, height, frames)
    elif kind == "plain":
        scene = plain_scene(rng, (width, height))
    elif kind == "hard":
        scene = hard_image(rng, width, height, 0.3)
    else:
        scene = image_scene(rng, width, height, objects)
    return with_text(scene, rng) if frames == 1 and rng.random() < text else scene


def _ground(rng: np.random.Generator) -> Look:
    """Flat, vivid or greyish."""
    kind = rng.random()
    if kind < 0.2:
        shades = [*GREYS, *(rgb for shades in FLAT.values() for rgb in shades)]
        return Look(shades[int(rng.integers(len(shades)))])
    return Look(vivid=bool(kind < 0.4))


def _crowd(rng, width: int, height: int, frames: int, objects: tuple[int, int]) -> Scene:
    placer = Placer(rng, width, height, frames)
    look = _ground(rng)
    for _ in range(int(rng.integers(objects[0], objects[1] + 1))):
        fields: dict = {"color": str(rng.choice(COLORS)), "size": draw_size(rng, 0.3)}
        if frames > 1:
            unit = DIRECTIONS[str(rng.choice(list(DIRECTIONS)))]
            speed = rng.uniform(5, 16) if rng.random() < 0.5 else 0.0
            fields["velocity"] = (float(unit[0] * speed), float(unit[1] * speed))
            if not speed:
                fields["visible"] = ((), ((0.0, 1.0),), ((1.0, 2.0),))[int(rng.integers(3))]
        elif rng.random() < 0.15:  # now and then as large as in a drawing
            fields["size"] = int(rng.integers(62, max(63, min(width, height) // 2)))
        if look.flat is not None or rng.random() < 0.2:
            shades = FLAT[fields["color"]]
            fields["rgb"] = shades[int(rng.integers(len(shades)))]
        if fields.get("rgb") != look.flat or look.flat is None:
            placer.place(shape=str(rng.choice(SHAPES)), **fields)
    return Scene(
        width, height, frames, tuple(placer.things), int(rng.integers(BACKGROUNDS)), look=look
    )


def _brief(rng: np.random.Generator, width: int, height: int, frames: int) -> Scene:
    placer = Placer(rng, width, height, frames)
    shapes, colors = rng.permutation(SHAPES), rng.permutation(COLORS)
    for k in range(int(rng.integers(4, 7))):
        start = float(rng.integers(frames))
        placer.place(
            shape=str(shapes[k]),
            color=str(colors[k]),
            size=int(rng.integers(26, 52)),
            visible=((start, start + 1),),
        )
    return Scene(width, height, frames, tuple(placer.things), int(rng.integers(BACKGROUNDS)))


def _acts(rng: np.random.Generator, width: int, height: int, frames: int) -> Scene:
    """Several objects that move or flash, so that one clip holds many labels of both kinds."""
    placer = Placer(rng, width, height, frames)
    shapes, colors = rng.permutation(SHAPES), rng.permutation(COLORS)
    movers = int(rng.integers(2, 4))
    for k in range(movers + int(rng.integers(2, 4))):
        fields: dict = {"shape": str(shapes[k]), "color": str(colors[k])}
        if k < movers:
            unit = DIRECTIONS[str(rng.choice(list(DIRECTIONS)))]
            speed = rng.uniform(50, 110) / frames
            fields["velocity"] = (float(unit[0] * speed), float(unit[1] * speed))
        else:
            parity = int(rng.integers(2))
            pairs = np.sort(rng.permutation(frames // 2)[: int(rng.integers(1, 5))])
            fields["visible"] = tuple((float(2 * p + parity), 2.0 * p + parity + 1) for p in pairs)
        placer.place(size=int(rng.integers(24, 50)), **fields)
    order = rng.permutation(len(placer.things))
    things = tuple(placer.things[i] for i in order)
    return Scene(width, height, frames, things, int(rng.integers(BACKGROUNDS)))
