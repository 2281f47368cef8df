"""Rules on the cells of recorded pictures, with the functions that the reducers use."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tokencomp.reducers._pixels import cells_of
from tokencomp.reducers.delta import new_cells

CELL = 32
"""Pixels a side of one visual token of Qwen3-VL."""
FLAT = 40  # range of values under which a cell of a scan counts as nearly flat


def picture(path: Path) -> Tensor:
    """uint8 (height, width, 3)."""
    with Image.open(path) as image:
        return torch.from_numpy(np.asarray(image.convert("RGB")).copy())


def kept_of_session(pictures: list[Tensor], threshold: int) -> list[Tensor]:
    """What `delta` keeps of every picture, bool (rows, columns); another size is kept whole."""
    last: dict[torch.Size, Tensor] = {}
    out = []
    for one in pictures:
        cells = cells_of(one, CELL)
        kept, last[one.shape] = new_cells(cells.flatten(0, 1)[None], last.get(one.shape), threshold)
        out.append(kept.view(cells.shape[:2]))
    return out


def differences(before: Tensor, after: Tensor) -> Tensor:
    """The largest difference of two values in every cell of two pictures of one size, int16."""
    gap = (after.short() - before.short()).abs()
    return cells_of(gap, CELL).amax(-1)


def copies(one: Tensor) -> Tensor:
    """Cells that equal an earlier cell of the picture in every bit, bool (rows, columns)."""
    cells = cells_of(one, CELL)
    seen: set[bytes] = set()
    out = torch.zeros(cells.shape[:2], dtype=torch.bool)
    for k, cell in enumerate(cells.flatten(0, 1).numpy()):
        value = cell.tobytes()
        out.view(-1)[k] = value in seen
        seen.add(value)
    return out


def flat(one: Tensor) -> Tensor:
    """Cells whose values of one colour lie within `FLAT` of each other, bool (rows, columns)."""
    cells = cells_of(one, CELL).unflatten(-1, (-1, 3)).short()
    return (cells.amax(2) - cells.amin(2)).amax(-1) <= FLAT


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
