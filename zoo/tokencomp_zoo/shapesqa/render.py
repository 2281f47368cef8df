"""Pixels of ShapesQA scenes: textured backgrounds, anti-aliased shapes, real mp4 files."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from tokencomp.zoo.shapesqa.lettering import draw_text
from tokencomp.zoo.shapesqa.scenes import Scene, Thing
from tokencomp.zoo.shapesqa.textures import background

HUES = {
    "red": 0,
    "orange": 27,
    "yellow": 55,
    "green": 120,
    "cyan": 180,
    "blue": 228,
    "purple": 276,
    "pink": 325,
}
_SCALE = 4  # supersampling of the shape masks


def _star(points: int, inner: float) -> list[tuple[float, float]]:
    out = []
    for k in range(2 * points):
        radius = 0.5 if k % 2 == 0 else inner
        angle = math.pi * k / points - math.pi / 2
        out.append((0.5 + radius * math.cos(angle), 0.5 + radius * math.sin(angle)))
    return out


_POLYGONS = {
    "square": [(0.04, 0.04), (0.96, 0.04), (0.96, 0.96), (0.04, 0.96)],
    "triangle": [(0.5, 0.02), (1.0, 0.96), (0.0, 0.96)],
    "diamond": [(0.5, 0.0), (0.86, 0.5), (0.5, 1.0), (0.14, 0.5)],
    "star": _star(5, 0.21),
}


@lru_cache(maxsize=1024)
def shape_mask(shape: str, size: int) -> np.ndarray:
    """Coverage of ``shape`` in a ``size`` × ``size`` box, float32 (size, size) in [0, 1]."""
    side = size * _SCALE
    canvas = Image.new("L", (side, side), 0)
    draw = ImageDraw.Draw(canvas)
    if shape in ("circle", "ring"):
        draw.ellipse((0, 0, side - 1, side - 1), fill=255)
        if shape == "ring":
            inset = side * 0.25
            draw.ellipse((inset, inset, side - 1 - inset, side - 1 - inset), fill=0)
    elif shape == "cross":
        a, b = side * 0.34, side * 0.66
        draw.rectangle((a, 0, b, side - 1), fill=255)
        draw.rectangle((0, a, side - 1, b), fill=255)
    else:
        draw.polygon([(x * (side - 1), y * (side - 1)) for x, y in _POLYGONS[shape]], fill=255)
    mask = np.asarray(canvas.reduce(_SCALE), np.float32) / 255.0
    mask.setflags(write=False)
    return mask


def thing_rgb(thing: Thing) -> np.ndarray:
    """Colour of one thing, float32 (3,) in [0, 255]; hue, saturation and value vary slightly."""
    if thing.rgb is not None:
        return np.asarray(thing.rgb, np.float32)
    hue = (HUES[thing.color] + 5.0 * thing.tint[0]) / 360.0
    saturation, value = 0.9 + 0.1 * thing.tint[1], 0.88 + 0.12 * thing.tint[2]
    return 255.0 * np.asarray(colorsys.hsv_to_rgb(hue % 1.0, saturation, value), np.float32)


def paint(scene: Scene, time: float, canvas: np.ndarray) -> np.ndarray:
    """Draw the things visible at ``time`` on a copy of ``canvas``; returns uint8 (H, W, 3)."""
    out = _view(scene, time, canvas)
    for thing in scene.visible_at(time):
        left, top, right, bottom = thing.box(time)
        alpha = shape_mask(thing.shape, thing.size)[..., None]
        view = out[top:bottom, left:right]
        view += alpha * (thing_rgb(thing) - view)
    if scene.look.grain:
        rng = np.random.default_rng([scene.background, round(1000 * time)])
        out = np.clip(out + rng.normal(0, scene.look.grain, (*out.shape[:2], 1)), 0, 255)
    pixels = out.round().astype(np.uint8)
    for text in scene.texts:
        pixels = draw_text(pixels, text)
    return pixels


def _view(scene: Scene, time: float, canvas: np.ndarray) -> np.ndarray:
    """The part of ``canvas`` behind the scene at ``time``, float32 (height, width, 3), a copy."""
    slack = [round(abs(v) * scene.frames) for v in scene.look.pan]
    left, top = (
        round(-v * time) + (room if v > 0 else 0)
        for v, room in zip(scene.look.pan, slack, strict=True)
    )
    return canvas[top : top + scene.height, left : left + scene.width].astype(np.float32)


def canvas_of(scene: Scene) -> np.ndarray:
    """Everything that the background of ``scene`` shows over time, in [0, 255].

    It is wider and higher than the scene where the camera pans.
    """
    width, height = (
        side + round(abs(v) * scene.frames)
        for side, v in zip((scene.width, scene.height), scene.look.pan, strict=True)
    )
    if scene.look.flat is not None:
        return np.broadcast_to(np.asarray(scene.look.flat, np.float32), (height, width, 3))
    return background(scene.background, width, height, scene.look.vivid)


def render(scene: Scene, times: list[float] | None = None) -> np.ndarray:
    """Frames of a scene at ``times`` (default: the start of each logical frame).

    Returns
    -------
    numpy.ndarray
        uint8 (len(times), height, width, 3), RGB.
    """
    canvas = canvas_of(scene)
    times = [float(k) for k in range(scene.frames)] if times is None else times
    return np.stack([paint(scene, time, canvas) for time in times])


HOLD, FPS = 4, 8  # encoded frames per logical frame, and per second


def write_mp4(scene: Scene, path: Path, fps: int = FPS) -> Path:
    """Encode a scene as a real .mp4 (H.264, or MPEG-4 where x264 is missing), yuv420p.

    Each logical frame lasts ``HOLD`` encoded frames with smooth motion in between, so evenly spaced
    sampling of ``scene.frames`` frames meets every logical frame once.
    """
    times = [k / HOLD for k in range(scene.frames * HOLD)]
    return encode_mp4(render(scene, times), path, fps)


def encode_mp4(frames: Iterable[np.ndarray], path: Path, fps: int = FPS) -> Path:
    """Encode frames, uint8 (height, width, 3), as `write_mp4` does. Both sides must be even."""
    import av

    codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
    with av.open(str(path), "w", format="mp4") as container:
        options = {"crf": "20", "preset": "veryfast"} if codec == "libx264" else {"qscale": "3"}
        stream: Any = container.add_stream(codec, rate=fps, options=options)
        stream.pix_fmt, stream.thread_count = "yuv420p", 1  # the same bytes on every machine
        for number, array in enumerate(frames):
            if number == 0:
                stream.height, stream.width = array.shape[:2]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(array, format="rgb24")))
        container.mux(stream.encode())
    return path
