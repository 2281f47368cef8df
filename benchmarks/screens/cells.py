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
