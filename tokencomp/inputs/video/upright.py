"""Decoded frames as pictures of a given size, in display orientation."""

from __future__ import annotations

from typing import Any

import numpy as np


def scaled_size(width: int, height: int, size: int | None) -> tuple[int, int]:
    """Width and height with a longer side of at most `size` pixels."""
    longest = max(width, height)
    if size is None or longest <= size:
        return width, height
    return max(1, round(width * size / longest)), max(1, round(height * size / longest))


def shown_size(frame: Any) -> tuple[int, int]:
    """Displayed width and height of an `av.VideoFrame`."""
    return (frame.height, frame.width) if _turn(frame)[0] else (frame.width, frame.height)


def rgb(frame: Any, size: tuple[int, int] | None = None) -> np.ndarray:
    """An `av.VideoFrame` in display orientation, uint8 (height, width, 3).

    Scaled to the width and height of `size` during colour conversion.
    """
    swapped, mirrored, overturned = _turn(frame)
    width, height = size or shown_size(frame)
    stored = (height, width) if swapped else (width, height)
    if (frame.width, frame.height) != stored:
        frame = frame.reformat(*stored, format="rgb24", interpolation="BICUBIC")
    picture = np.asarray(frame.to_ndarray(format="rgb24"))
    picture = picture.swapaxes(0, 1) if swapped else picture
    return picture[:: -1 if overturned else 1, :: -1 if mirrored else 1]


def _turn(frame: Any) -> tuple[bool, bool, bool]:
    """Whether to transpose, then to flip left and right, and top and bottom.

    Phones store pictures in sensor orientation, with a matrix that maps (x, y) to (ax + cy, bx +
    dy). The nearest of the eight right-angle transformations is used.
    """
    matrix = frame.side_data.get("DISPLAYMATRIX")  # `frame.rotation` is new in PyAV 14, and blind
    if matrix is None:  # to mirrors
        return False, False, False
    a, b, _, c, d, *_ = np.frombuffer(matrix, np.int32).tolist()
    return (True, c < 0, b < 0) if abs(b) > abs(a) else (False, a < 0, d < 0)
