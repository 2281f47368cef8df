"""Pixels of ShapesQA scenes: textured backgrounds, anti-aliased shapes, real mp4 files."""

from __future__ import annotations

import colorsys
import math
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from tokencomp.shapesqa.scenes import Scene, Thing

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
    hue = (HUES[thing.color] + 5.0 * thing.tint[0]) / 360.0
    saturation, value = 0.9 + 0.1 * thing.tint[1], 0.88 + 0.12 * thing.tint[2]
    return 255.0 * np.asarray(colorsys.hsv_to_rgb(hue % 1.0, saturation, value), np.float32)


def _muted(rng: np.random.Generator) -> np.ndarray:
    """A greyish colour that no object can have, float32 (3,)."""
    rgb = colorsys.hsv_to_rgb(rng.random(), rng.uniform(0.0, 0.3), rng.uniform(0.1, 0.85))
    return 255.0 * np.asarray(rgb, np.float32)


def _smooth_noise(rng: np.random.Generator, width: int, height: int, cell: int) -> np.ndarray:
    """Random colours on a coarse lattice, interpolated: float32 (height, width, 3), mean 0."""
    small = rng.normal(0, 1, (height // cell + 2, width // cell + 2, 3)).astype(np.float32)
    small = 0.35 * small + 0.65 * small.mean(axis=2, keepdims=True)
    coded = Image.fromarray(np.clip(small * 40 + 128, 0, 255).astype(np.uint8))
    return np.asarray(coded.resize((width, height), Image.Resampling.BICUBIC), np.float32) - 128.0


def _gradient(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    a, b = _muted(rng), _muted(rng)
    angle = rng.uniform(0, 2 * math.pi)
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    t = (x / width - 0.5) * math.cos(angle) + (y / height - 0.5) * math.sin(angle) + 0.5
    return a + np.clip(t, 0, 1)[..., None] * (b - a)


def _stripes(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    a, b = _muted(rng), _muted(rng)
    period, angle = rng.uniform(6, 40), rng.uniform(0, math.pi)
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    phase = (x * math.cos(angle) + y * math.sin(angle)) / period
    wave = (np.sin(2 * math.pi * phase) > 0).astype(np.float32)
    return a + wave[..., None] * (b - a)


def _checker(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    a, b, side = _muted(rng), _muted(rng), int(rng.integers(5, 34))
    y, x = np.mgrid[0:height, 0:width]
    wave = ((x // side + y // side) % 2).astype(np.float32)
    return a + wave[..., None] * (b - a)


def _clutter(rng: np.random.Generator, base: Image.Image, marks: int) -> Image.Image:
    """Distractors: greyish bars, arcs, ellipses and dots that no question is about."""
    draw = ImageDraw.Draw(base)
    for _ in range(marks):
        color = tuple(int(c) for c in _muted(rng))
        x, y = rng.uniform(0, base.width), rng.uniform(0, base.height)
        w, h = rng.uniform(4, 50, 2)
        kind = int(rng.integers(4))
        if kind == 0:
            draw.line((x, y, x + w - 25, y + h - 25), fill=color, width=int(rng.integers(1, 6)))
        elif kind == 1:
            draw.ellipse((x, y, x + w, y + 0.45 * h + 2), fill=color)
        elif kind == 2:
            draw.rectangle((x, y, x + w, y + 0.3 * h + 2), fill=color)
        else:
            start = int(rng.integers(360))
            draw.arc((x, y, x + w, y + h), start, start + 200, fill=color, width=3)
    return base


def background(seed: int, width: int, height: int) -> np.ndarray:
    """A hard background: gradient, stripes or checks under noise, clutter and distractors.

    Returns float32 (height, width, 3) in [0, 255]; never one flat colour.
    """
    rng = np.random.default_rng(seed)
    painters = (_gradient, _gradient, _stripes, _checker)
    canvas = painters[int(rng.integers(len(painters)))](rng, width, height)
    canvas = canvas + rng.uniform(0.3, 1.0) * _smooth_noise(rng, width, height, 28)
    canvas = canvas + rng.uniform(0.0, 0.8) * _smooth_noise(rng, width, height, 7)
    image = Image.fromarray(np.clip(canvas, 0, 255).astype(np.uint8))
    image = _clutter(rng, image, int(rng.integers(3, 12)))
    grain = rng.normal(0, rng.uniform(1, 9), (height, width, 1)).astype(np.float32)
    return np.clip(np.asarray(image, np.float32) + grain, 0, 255)


def paint(scene: Scene, time: float, canvas: np.ndarray) -> np.ndarray:
    """Draw the things visible at ``time`` on a copy of ``canvas``; returns uint8 (H, W, 3)."""
    out = canvas.copy()
    for thing in scene.visible_at(time):
        left, top, right, bottom = thing.box(time)
        alpha = shape_mask(thing.shape, thing.size)[..., None]
        view = out[top:bottom, left:right]
        view += alpha * (thing_rgb(thing) - view)
    return out.round().astype(np.uint8)


def owner_map(scene: Scene, time: float = 0.0) -> np.ndarray:
    """Index of the thing that covers each pixel, int8 (H, W), -1 for background."""
    owner = np.full((scene.height, scene.width), -1, np.int8)
    for index, thing in enumerate(scene.things):
        if thing.visible_at(time):
            left, top, right, bottom = thing.box(time)
            owner[top:bottom, left:right][shape_mask(thing.shape, thing.size) > 0.5] = index
    return owner


def render(scene: Scene, times: list[float] | None = None) -> np.ndarray:
    """Frames of a scene at ``times`` (default: the start of each logical frame).

    Returns
    -------
    numpy.ndarray
        uint8 (len(times), height, width, 3), RGB.
    """
    canvas = background(scene.background, scene.width, scene.height)
    times = [float(k) for k in range(scene.frames)] if times is None else times
    return np.stack([paint(scene, time, canvas) for time in times])


def render_image(scene: Scene) -> Image.Image:
    """The still picture of a one-frame scene."""
    return Image.fromarray(render(scene, [0.0])[0])


def write_mp4(scene: Scene, path: Path, hold: int = 4, fps: int = 8) -> Path:
    """Encode a scene as a real .mp4 (H.264, or MPEG-4 where x264 is missing), yuv420p.

    Each logical frame lasts ``hold`` encoded frames with smooth motion in between, so evenly spaced
    sampling of ``scene.frames`` frames meets every logical frame once.
    """
    import av

    codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
    times = [k / hold for k in range(scene.frames * hold)]
    with av.open(str(path), "w") as container:
        options = {"crf": "20", "preset": "veryfast"} if codec == "libx264" else {"qscale": "3"}
        stream: Any = container.add_stream(codec, rate=fps, options=options)
        stream.width, stream.height, stream.pix_fmt = scene.width, scene.height, "yuv420p"
        stream.thread_count = 1  # the same bytes on every machine
        for array in render(scene, times):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(array, format="rgb24")))
        container.mux(stream.encode())
    return path
