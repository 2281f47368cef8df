"""Steps of reducers that compare pixels: cells of a picture, and whether two of them differ."""

from __future__ import annotations

from torch import Tensor

from tokencomp.plan.options import effective

OF_PIXELS = effective(
    lambda reducer, pixels: pixels,
    "in this stage, which compares features; pixels are seen before block 0 of the tower",
)
"""Metadata of options about pixels."""
OF_FEATURES = effective(
    lambda reducer, pixels: not pixels,
    "in this stage, which compares pixels; features are seen from block 1 of the tower on",
)
"""Metadata of options about features."""


def cells_of(picture: Tensor, size: int) -> Tensor:
    """Cells of `size` × `size` pixels of a picture (H, W, channels), shape (h, w, d).

    A part of a cell at the right or at the bottom is left out.
    """
    h, w = (side // size for side in picture.shape[:2])
    tiles: Tensor = picture[: h * size, : w * size].unflatten(1, (w, size)).unflatten(0, (h, size))
    return tiles.transpose(1, 2).flatten(2)


def differ(a: Tensor, b: Tensor, limit: float | Tensor) -> Tensor:
    """Whether the largest difference along the last axis is above `limit`; NaN differs from all.

    `a` and `b` (…, d) are pixels of cells, floating or whole numbers; `limit` is in their unit, one
    number, or one for each of the d values.
    """
    if a.element_size() < 4:  # bytes would wrap around, and half precision would round
        a, b = a.float(), b.float()
    return ~((a - b).abs() <= limit).all(-1)
