"""Numbers of media tokens as digits in extra columns: offsets from the base position, and sizes.

Digits to the base 256 are exact in every dtype of a model: bfloat16 represents integers up to 256
exactly, float16 up to 2048. A kept token at offset (t, h, w) = (3, 0, 300) from the base:

                      high digits   low digits     300 = 1 · 256 + 44
    | d features |      0   0   1     3   0  44 |   one row of the engine's media embeddings
                        t   h   w     t   h   w

A merged row has the digits of its size, the number of tokens that it represents, before those:

    | d features | size: high, low | offsets, if the engine takes positions of its rows |

A row of text between the frames of a video has one offset for t, h and w, and no features: an
encoder in another process has no embeddings of text. In place of the offsets for h and w it has
its token id, id = a · 256² + b · 256 + c, and 256, which is no digit, says so:

                      high digits   low digits
    |     zeros      |   t 256   a     t   b   c |
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

MAX_OFFSET = 65535  # two digits to the base 256
OFFSETS = 6  # columns of the three offsets
SIZES = 2  # columns of a size
TEXT = 256  # in place of a high digit, of a row that has a token id in place of features


def pack_offsets(offsets: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert numbers (m, k) from 0 to 65535 to digits (k, 2m), which are exact in `dtype`."""
    if offsets.numel() and not 0 <= int(offsets.min()) <= int(offsets.max()) <= MAX_OFFSET:
        raise RuntimeError(f"offsets or sizes up to {int(offsets.max())} do not fit 16 bits.")
    return torch.cat([offsets >> 8, offsets & 255]).T.to(dtype)


def with_offsets(rows: Tensor, offsets: Tensor) -> Tensor:
    """Append the digits of offsets (3, k), or of sizes (1, k), to rows (k, d) as columns."""
    return torch.cat([rows, pack_offsets(offsets, rows.dtype).to(rows.device)], dim=1)


def unpack_offsets(digits: Tensor) -> Tensor:
    """Convert digits (k, 2m) to numbers (m, k), int64."""
    high, low = digits.float().round().long().T.chunk(2)
    return high * 256 + low


def split_offsets(rows: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Rows without the columns of offsets (from `width` on), and offsets (3, k) or zeros."""
    if rows.shape[1] < width + OFFSETS:
        return rows, torch.zeros(3, rows.shape[0], dtype=torch.long, device=rows.device)
    return rows[:, :-OFFSETS], unpack_offsets(rows[:, -OFFSETS:])


def unpack_sizes(rows: Tensor, width: int) -> Tensor:
    """Sizes (k,), int64, of rows whose offsets are split off; 1 without columns of sizes."""
    if rows.shape[1] == width:
        return torch.ones(rows.shape[0], dtype=torch.long, device=rows.device)
    return unpack_offsets(rows[:, width:])[0]


def with_text(offsets: Tensor, ids: Tensor, text: Tensor) -> Tensor:
    """Digits (k, 6) of offsets (3, k), with the token `ids` (k,) where `text` (k,) is true."""
    digits = pack_offsets(offsets, torch.float32)
    ids = ids[text]
    columns = torch.stack([torch.full_like(ids, TEXT), ids >> 16, ids >> 8 & 255, ids & 255])
    digits[text.nonzero(), [1, 2, 4, 5]] = columns.T.to(digits)
    return digits


def split_text(offsets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Inverse of `with_text` after `unpack_offsets`: offsets (3, k), ids and mask of text (k,)."""
    t, h, w = offsets
    text = h >= TEXT * 256
    ids = torch.where(text, (w >> 8 << 16) + ((h & 255) << 8) + (w & 255), 0)
    return torch.where(text, t, offsets), ids, text


def grid_offsets(grid: tuple[int, int, int], t_factor: float) -> np.ndarray:
    """Offsets (3, t·h·w) of a grid whose frames are `t_factor` apart, truncated as in the model."""
    offsets = np.indices(grid).reshape(3, -1)
    if t_factor != 1.0:
        offsets[0] = (offsets[0] * t_factor).astype(np.int64)
    return offsets


def grid_extent(grid: tuple[int, int, int], t_factor: float = 1.0) -> int:
    """Return the distance from the base of a grid to the position of the next token."""
    t, h, w = grid
    return max(int((t - 1) * t_factor) + 1, h, w)
