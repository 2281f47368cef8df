"""What stands behind the things of a scene: a crop of a photograph; in training, many from few.

A tower that has seen the same few backgrounds again and again finds things in every other one. So
training turns, mirrors and recolors them, and lays one over another. Validation and test pictures
show photographs as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from PIL import Image

PLAIN_SHARE = 0.25  # of training pictures whose background is not changed
SECOND_SHARE = 0.4  # of the changed ones under which a second background shows through
GRID = (2, 7)  # least and greatest number of cells of the mask between two backgrounds, per side
SHARPNESS = 6.0  # of that mask: at 1 all is mixed, from 20 on the borders are hard


class Backgrounds(Protocol):
    """Photographs for backgrounds, by split."""

    def backgrounds(self, split: str) -> int:
        """How many backgrounds a split has."""

    def background(self, split: str, number: int) -> Image.Image:
        """An RGB picture of any size."""


@dataclass(frozen=True)
class Look:
    """How a training picture changes its background.

    Attributes
    ----------
    turns
        Quarter turns.
    is_mirrored
        Whether left and right are swapped.
    channels
        Order of red, green and blue.
    hue
        Turn of all hues, in 1/256 of a full turn.
    gamma
        Exponent of the brightness; below 1 is brighter.
    """

    turns: int = 0
    is_mirrored: bool = False
    channels: tuple[int, int, int] = (0, 1, 2)
    hue: int = 0
    gamma: float = 1.0

    def on(self, picture: Image.Image) -> np.ndarray:
        """uint8 (height, width, 3) of a square RGB picture."""
        hue, *rest = picture.convert("HSV").split() if self.hue else [None]
        if hue is not None:
            turned = hue.point([(value + self.hue) % 256 for value in range(256)])
            picture = Image.merge("HSV", (turned, *rest)).convert("RGB")
        pixels = np.rot90(np.asarray(picture)[..., list(self.channels)], self.turns)
        pixels = pixels[:, ::-1] if self.is_mirrored else pixels
        table = np.rint(255 * (np.arange(256) / 255) ** self.gamma).astype(np.uint8)
        return table[pixels]


@dataclass(frozen=True)
class Ground:
    """A square crop of a background photograph.

    Attributes
    ----------
    number
        Of the photograph in its split.
    crop
        Side of the square as a share of the shorter side; its place in [0, 1] across and down.
    look
        What training changes.
    second
        A background that shows through, where ``mask`` says so.
    mask
        Number of cells per side and seed of a random mask.
    """

    number: int
    crop: tuple[float, float, float]
    look: Look | None = None
    second: Ground | None = None
    mask: tuple[int, int] = (0, 0)


def plain_ground(
    rng: np.random.Generator, library: Backgrounds, split: str, least: float
) -> Ground:
    """A random crop of at least the share ``least`` of a random photograph."""
    number = int(rng.integers(library.backgrounds(split)))
    return Ground(
        number, (float(rng.uniform(least, 1.0)), float(rng.random()), float(rng.random()))
    )


def sample_ground(rng: np.random.Generator, library: Backgrounds, split: str) -> Ground:
    """A random background; in the split `train` it is changed, as the module says."""
    ground = plain_ground(rng, library, split, 0.4)
    if split != "train" or rng.random() < PLAIN_SHARE:
        return ground
    second, mask = None, (0, 0)
    if rng.random() < SECOND_SHARE:
        other = plain_ground(rng, library, split, 0.4)
        second = Ground(other.number, other.crop, _sample_look(rng))
        mask = (int(rng.integers(*GRID)), int(rng.integers(2**31)))
    return Ground(ground.number, ground.crop, _sample_look(rng), second, mask)


def _sample_look(rng: np.random.Generator) -> Look:
    first, second, third = (int(k) for k in rng.permutation(3))
    return Look(
        int(rng.integers(4)),
        bool(rng.random() < 0.5),
        (first, second, third) if rng.random() < 0.3 else (0, 1, 2),
        int(rng.integers(256)) if rng.random() < 0.3 else 0,
        float(np.exp(rng.uniform(-0.5, 0.5))),
    )


def draw_ground(ground: Ground, library: Backgrounds, split: str, size: int) -> Image.Image:
    """The background, RGB, ``size`` px on both sides."""
    photo = library.background(split, ground.number)
    share, x, y = ground.crop
    side = max(16, int(min(photo.size) * share))
    left, top = int((photo.width - side) * x), int((photo.height - side) * y)
    box = (left, top, left + side, top + side)
    picture = photo.resize((size, size), Image.Resampling.BILINEAR, box)
    if ground.look is not None:
        picture = Image.fromarray(ground.look.on(picture))
    if ground.second is not None:
        other = draw_ground(ground.second, library, split, size)
        picture = Image.composite(picture, other, _mask(*ground.mask, size))
    return picture


def _mask(cells: int, seed: int, size: int) -> Image.Image:
    """Smooth random patches that are white or black, with soft borders; mode L."""
    noise = np.random.default_rng(seed).standard_normal((cells, cells)).astype(np.float32)
    smooth = Image.fromarray(noise).resize((size, size), Image.Resampling.BICUBIC)
    values = 1 / (1 + np.exp(-SHARPNESS * np.asarray(smooth)))
    return Image.fromarray(np.rint(255 * values).astype(np.uint8))
