"""Tables of the patches that every token of a square picture reads."""

from __future__ import annotations

import torch
from torch import Tensor


def squares(side: int, size: int, order: str = "rows", partial: bool = True) -> Tensor:
    """Patches of a grid of side × side that tokens of size × size patches each read.

    Parameters
    ----------
    order
        "rows": tokens run along rows; "columns": down columns first.
    partial
        Whether squares at the right and at the bottom may be cut off; otherwise they are no tokens.

    Returns
    -------
    Tensor of int64, shape (tokens, size²)
        Patch numbers; -1 for patches outside of the grid.
    """
    count = -(-side // size) if partial else side // size
    at = torch.arange(count * size)
    inside = at < side
    grid = torch.where(inside[:, None] & inside, at[:, None] * side + at, -1)
    cells = grid.view(count, size, count, size).transpose(1, 2)
    cells = cells.transpose(0, 1) if order == "columns" else cells
    return cells.reshape(count * count, size * size)


def pooled(table: Tensor, size: int) -> Tensor:
    """Patches of tokens that average size × size tokens of `table`, see `squares`."""
    return table[squares(round(len(table) ** 0.5), size, partial=False)].flatten(1)


def bilinear(side: int, out: int) -> Tensor:
    """Patches of side × side that bilinear resampling to out × out reads, int64 (out², 4).

    A patch of weight 0 counts as read, because 0 · NaN is NaN.
    """
    # The same operations in float32 as torch.nn.functional.interpolate without align_corners.
    source = ((torch.arange(out) + 0.5) * (side / out) - 0.5).clamp(min=0)
    low = source.floor().long()
    pair = torch.stack([low, (low + 1).clamp(max=side - 1)], 1)  # (out, 2)
    return (pair[:, None, :, None] * side + pair[None, :, None, :]).reshape(out * out, 4)
