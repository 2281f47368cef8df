"""Whether one screenshot shows parts of the one before it, moved up or down."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from benchmarks.screens.cells import CELL

NEAR = 6.0  # mean difference of two cells that count as the same after a shift
RANGE = 24  # of values in a cell that has something to recognise
FEWEST = 20  # such cells that have changed
SMALLEST = 4  # pixels of a shift: smaller ones match smooth cells anywhere
SHARE = 0.5  # of them that a shift must explain


def shift(before: Tensor, after: Tensor, changed: Tensor) -> tuple[int, float]:
    """The vertical shift that explains most changed cells, and the share that it explains.

    Parameters
    ----------
    before, after : Tensor
        uint8 (height, width, 3), of one size.
    changed : Tensor
        bool (rows, columns): which cells differ.

    Returns
    -------
    (pixels, share)
        (0, 0.0) where fewer than `FEWEST` cells with something in them have changed.
    """
    one, two = (x.float().mean(-1).numpy() for x in (before, after))
    rows, columns = two.shape[0] // CELL, two.shape[1] // CELL
    cut = two[: rows * CELL, : columns * CELL].reshape(rows, CELL, columns, CELL)
    textured = np.ptp(cut, axis=(1, 3)) > RANGE
    at = np.argwhere(textured & changed.numpy())
    if len(at) < FEWEST:
        return 0, 0.0
    candidates = _by_profile(one, two, at)
    return max(((s, _explained(one, two, at, s)) for s in candidates), key=lambda found: found[1])


def _by_profile(one: np.ndarray, two: np.ndarray, at: np.ndarray, best: int = 3) -> list[int]:
    """Shifts under which the means of rows of the changed cells agree most often."""
    columns = two.shape[1] // CELL
    profiles = [x[:, : columns * CELL].reshape(len(x), columns, CELL).mean(2) for x in (one, two)]
    wanted = np.zeros(profiles[0].shape, bool)
    for row, column in at:
        wanted[row * CELL : (row + 1) * CELL, column] = True
    height = len(one)
    scores = {}
    for s in range(-height + CELL, height - CELL + 1):
        if abs(s) < SMALLEST:
            continue
        a, b = (max(0, -s), height - max(0, s))
        near = np.abs(profiles[1][a:b] - profiles[0][a + s : b + s]) < 2
        scores[s] = int((near & wanted[a:b]).sum())
    return sorted(scores, key=lambda s: -scores[s])[:best]


def _explained(one: np.ndarray, two: np.ndarray, at: np.ndarray, s: int) -> float:
    """Share of cells that lie, moved by s rows, in the earlier picture."""
    right = 0
    for row, column in at:
        top, left = row * CELL, column * CELL
        if top + s >= 0 and top + s + CELL <= len(one):
            cell = two[top : top + CELL, left : left + CELL]
            old = one[top + s : top + s + CELL, left : left + CELL]
            right += bool(np.abs(cell - old).mean() <= NEAR)
    return right / len(at)


__all__ = ["FEWEST", "SHARE", "shift"]
