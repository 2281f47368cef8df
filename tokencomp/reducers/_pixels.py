"""What reducers that compare appearance look at: features, or thumbnails of pixels."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from tokencomp.plan.options import effective
from tokencomp.reducers._batch import finite_features
from tokencomp.tokens.tokens import Tokens

TURN = math.pi * (3 - math.sqrt(5))
"""The golden angle, in radians: its multiples never meet again, see `descriptor`."""
OF_PIXELS = effective(
    lambda reducer, pixels: pixels,
    "in this stage, which compares features; pixels are seen before block 0 of the tower",
)
"""Metadata of options about pixels."""


def descriptor(
    tokens: Tokens, pool: int, std_weight: float = 0.0, temporal_weight: float = 0.0
) -> Tensor:
    """What patches look like, float32, shape (n, d).

    In the vision tower before its first block these are the pixels of a cell, averaged over squares
    of `pool` × `pool` inside of every patch, with the contrast inside of squares and with what
    changes; everywhere else the features themselves. The mean square of the difference of two rows
    of pixels is proportional to

        |Δm|² + std_weight² · |Δs|² + temporal_weight² · |Δp|²

    with the means m and standard deviations s of the pixels of a square, both as mean squares over
    squares, channels and frames. A cell with the change c, the root mean square difference of the
    averages in successive frames of the cell, stands at p = c · (cos, sin)/√2 of an angle that
    grows by the golden angle from step to step of the video. Three steps, for example, are three
    points of a circle around 0 with radius c/√2:

        137.5°  *
                     0      *  0°
                      *  275°

    Cells that look the same and do not change (c = 0) coincide, whatever their step. Cells that
    flash alike in several steps do not: over many steps, the mean square distance of two of them is
    twice the square of the radius, c². So each flash can be kept.
    """
    x, pixels = finite_features(tokens.features).float(), tokens.pixels
    if pixels is None:
        return x
    pictures = x.view(len(x), -1, *pixels[1:])  # (n, pictures, height, width)
    means = _averages(pictures, pool)
    columns = [means.flatten(1)]
    if std_weight and pool > 1:
        # Relative to the mean of a patch, so that the difference of squares loses no digits.
        centre = pictures.mean((2, 3), keepdim=True)
        squares = _averages((pictures - centre).square(), pool)
        deviations = (squares - (means - centre).square()).clamp_(min=0).sqrt_()
        columns.append(std_weight * deviations.flatten(1))
    if temporal_weight and pixels[0] > 1:
        frames = means.view(len(x), -1, pixels[0], *means.shape[2:])
        changes = frames.diff(dim=2).square().mean((1, 2, 3, 4)).sqrt()
        scale = temporal_weight * math.sqrt(columns[0].shape[1] / 2)
        columns.append(scale * changes[:, None] * _steps(tokens))
    return torch.cat(columns, 1)


def _averages(pictures: Tensor, pool: int) -> Tensor:
    """Means over squares of `pool` × `pool` pixels, shape (n, pictures, height', width')."""
    if pool == 1:
        return pictures
    height, width = (max(1, round(side / pool)) for side in pictures.shape[2:])
    return torch.nn.functional.adaptive_avg_pool2d(pictures, (height, width))


def _steps(tokens: Tokens) -> Tensor:
    """Cosine and sine of the angle of every patch's step in time, float32, shape (n, 2)."""
    pairs = zip(tokens.host_cells(), tokens.grids, strict=True)
    angles = TURN * np.concatenate([cells // (h * w) for cells, (_, h, w) in pairs])
    table = np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32)
    return torch.from_numpy(table).to(tokens.device)


def cells_of(picture: Tensor, size: int) -> Tensor:
    """Cells of `size` × `size` pixels of a picture (H, W, channels), shape (h, w, d).

    A part of a cell at the right or at the bottom is left out.
    """
    h, w = (side // size for side in picture.shape[:2])
    tiles: Tensor = picture[: h * size, : w * size].unflatten(1, (w, size)).unflatten(0, (h, size))
    return tiles.transpose(1, 2).flatten(2)


def differ(a: Tensor, b: Tensor, limit: float | Tensor) -> Tensor:
    """Whether the largest difference along the last axis is above `limit`; NaN differs from all.

    Parameters
    ----------
    a, b : Tensor, shape (…, d)
        Pixels of cells, floating or whole numbers.
    limit
        In the unit of the values; one number, or one for each of the d values.
    """
    if a.element_size() < 4:  # bytes would wrap around, and half precision would round
        a, b = a.float(), b.float()
    return ~((a - b).abs() <= limit).all(-1)
