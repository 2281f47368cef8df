"""Offsets of media tokens from the base position of their item, and their digits in extra columns.

Digits to the base 256 are exact in every dtype of a model: bfloat16 represents integers up to 256
exactly, float16 up to 2048. A kept token that stands (t, h, w) = (3, 0, 300) behind the base:

                       high digits   low digits     300 = 1 · 256 + 44
    | d features |      0   0   1     3   0  44 |   one row of the engine's media embeddings
                        t   h   w     t   h   w
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

MAX_OFFSET = 65535  # two digits to the base 256


def pack_offsets(offsets: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert offsets (3, k) from 0 to 65535 to digits (k, 6), which are exact in `dtype`."""
    if offsets.numel() and not 0 <= int(offsets.min()) <= int(offsets.max()) <= MAX_OFFSET:
        raise RuntimeError(f"position offsets up to {int(offsets.max())} do not fit 16 bits.")
    return torch.cat([offsets >> 8, offsets & 255]).T.to(dtype)


def with_offsets(rows: Tensor, offsets: Tensor) -> Tensor:
    """Append the digits of offsets (3, k) to rows (k, d) as six columns."""
    return torch.cat([rows, pack_offsets(offsets, rows.dtype).to(rows.device)], dim=1)


def unpack_offsets(digits: Tensor) -> Tensor:
    """Convert digits (k, 6) to offsets (3, k), int64."""
    high, low = digits.float().round().long().T.chunk(2)
    return high * 256 + low


def grid_offsets(grid: tuple[int, int, int], t_factor: float) -> np.ndarray:
    """Return the offsets (3, t·h·w) of a grid from its base position.

    Frames are `t_factor` positions apart, truncated to integers as in the model.
    """
    offsets = np.indices(grid).reshape(3, -1)
    if t_factor != 1.0:
        offsets[0] = (offsets[0] * t_factor).astype(np.int64)
    return offsets


def grid_extent(grid: tuple[int, int, int], t_factor: float = 1.0) -> int:
    """Return the distance from the base of a grid to the position of the next token."""
    t, h, w = grid
    return max(int((t - 1) * t_factor) + 1, h, w)
