"""Delta: drop what equals the last kept cell at its place in an earlier picture."""

from __future__ import annotations

import torch
from torch import Tensor

from tokencomp.reducers._pixels import differ


def new_cells(
    pictures: Tensor, last: Tensor | None = None, limit: float | Tensor = 0
) -> tuple[Tensor, Tensor]:
    """Which cells of pictures of one size differ from the last kept cell at their place.

    Every cell is compared with the one last *kept*, so that slow changes add up. Without an
    earlier picture, the first one is kept whole.

    Parameters
    ----------
    pictures : Tensor, shape (n, cells, d)
        Pixels, in the order in which the pictures are shown.
    last : Tensor, shape (cells, d), or None
        What was kept last at every place of earlier pictures; NaN: nothing.
    limit
        Largest difference of two pixels that counts as equal, in the unit of the pixels.

    Returns
    -------
    keep : Tensor of bool, shape (n, cells)
    last : Tensor, shape (cells, d)
        What was kept last at every place after these pictures.
    """
    keep = []
    for cells in pictures:
        if last is None:
            new, last = torch.ones(len(cells), dtype=torch.bool, device=cells.device), cells
        else:
            new = differ(cells, last, limit)
            last = torch.where(new[:, None], cells, last)
        keep.append(new)
    assert last is not None
    return torch.stack(keep), last
