"""Backgrounds of ShapesQA: gradients, stripes and checks under noise, clutter and distractors."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Callable
from functools import partial

import numpy as np
from PIL import Image, ImageDraw

Colour = Callable[[np.random.Generator], np.ndarray]


def _colour(rng: np.random.Generator, vivid: bool) -> np.ndarray:
    """A greyish colour that no object can have, or a little paler or darker than theirs, (3,)."""
    saturation, value = ((0.3, 0.6), (0.2, 0.8)) if vivid else ((0.0, 0.3), (0.1, 0.85))
    rgb = colorsys.hsv_to_rgb(rng.random(), rng.uniform(*saturation), rng.uniform(*value))
    return 255.0 * np.asarray(rgb, np.float32)


def _smooth_noise(rng: np.random.Generator, width: int, height: int, cell: int) -> np.ndarray:
    """Random colours on a coarse lattice, interpolated: float32 (height, width, 3), mean 0."""
    small = rng.normal(0, 1, (height // cell + 2, width // cell + 2, 3)).astype(np.float32)
    small = 0.35 * small + 0.65 * small.mean(axis=2, keepdims=True)
    coded = Image.fromarray(np.clip(small * 40 + 128, 0, 255).astype(np.uint8))
    return np.asarray(coded.resize((width, height), Image.Resampling.BICUBIC), np.float32) - 128.0


def _gradient(rng: np.random.Generator, width: int, height: int, colour: Colour) -> np.ndarray:
    a, b = colour(rng), colour(rng)
    angle = rng.uniform(0, 2 * math.pi)
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    t = (x / width - 0.5) * math.cos(angle) + (y / height - 0.5) * math.sin(angle) + 0.5
    return a + np.clip(t, 0, 1)[..., None] * (b - a)


def _stripes(rng: np.random.Generator, width: int, height: int, colour: Colour) -> np.ndarray:
    a, b = colour(rng), colour(rng)
    period, angle = rng.uniform(6, 40), rng.uniform(0, math.pi)
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    phase = (x * math.cos(angle) + y * math.sin(angle)) / period
    wave = (np.sin(2 * math.pi * phase) > 0).astype(np.float32)
    return a + wave[..., None] * (b - a)


def _checker(rng: np.random.Generator, width: int, height: int, colour: Colour) -> np.ndarray:
    a, b, side = colour(rng), colour(rng), int(rng.integers(5, 34))
    y, x = np.mgrid[0:height, 0:width]
    wave = ((x // side + y // side) % 2).astype(np.float32)
    return a + wave[..., None] * (b - a)


def _clutter(
    rng: np.random.Generator, base: Image.Image, marks: int, colour: Colour
) -> Image.Image:
    """Distractors: bars, arcs, ellipses and dots that no question is about."""
    draw = ImageDraw.Draw(base)
    for _ in range(marks):
        color = tuple(int(c) for c in colour(rng))
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


def background(seed: int, width: int, height: int, vivid: bool = False) -> np.ndarray:
    """A hard background: gradient, stripes or checks under noise, clutter and distractors.

    Greyish, or with ``vivid`` in the colours of objects.
    Returns float32 (height, width, 3) in [0, 255]; never one flat colour.
    """
    rng = np.random.default_rng(seed)
    colour = partial(_colour, vivid=vivid)
    painters = (_gradient, _gradient, _stripes, _checker)
    canvas = painters[int(rng.integers(len(painters)))](rng, width, height, colour)
    canvas = canvas + rng.uniform(0.3, 1.0) * _smooth_noise(rng, width, height, 28)
    canvas = canvas + rng.uniform(0.0, 0.8) * _smooth_noise(rng, width, height, 7)
    image = Image.fromarray(np.clip(canvas, 0, 255).astype(np.uint8))
    image = _clutter(rng, image, int(rng.integers(3, 12)), colour)
    grain = rng.normal(0, rng.uniform(1, 9), (height, width, 1)).astype(np.float32)
    return np.clip(np.asarray(image, np.float32) + grain, 0, 255)
