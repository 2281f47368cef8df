"""Share of the words of a picture that a method keeps: a check of documents without labels."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tokencomp.errors import OptionError

Box = tuple[float, float, float, float]
"""Left, top, right, bottom in pixels of the picture."""
FORMS = (
    'a row "x1,y1,x2,y2,x3,y3,x4,y4,text" of corners per box (CSV, as in SROIE), or a JSON list '
    'of boxes [left, top, right, bottom], or of objects that have one as "box"'
)
HALF = 0.5
"""Share of its cells that a word needs to count as kept."""


def load_boxes(path: Path) -> list[Box]:
    """Boxes of a CSV or JSON file, in its order, see `FORMS`.

    Boxes are four numbers (left, top, right, bottom) or eight (the corners); CSV rows have eight,
    then text, commas included. Raises `OptionError` for a file that is not of this form.
    """
    try:
        text = path.read_text(encoding="utf-8-sig", errors="replace")
        if path.suffix.lower() == ".json":
            rows = json.loads(text)
        else:  # the corners in every row that is not empty
            rows = [line.split(",", 8)[:8] for line in text.splitlines() if line.strip()]
        boxes = [_box(row) for row in rows]
    except (OSError, TypeError, ValueError) as error:
        raise OptionError(f"--boxes {path}: {error}. Give {FORMS}.") from error
    if not boxes:
        raise OptionError(f"--boxes {path}: it has no boxes. Give {FORMS}.")
    return boxes


def _box(row: Any) -> Box:
    """The box around four or eight numbers; `ValueError` or `TypeError` for anything else."""
    values = [float(v) for v in (row["box"] if isinstance(row, dict) and "box" in row else row)]
    left, right = min(values[0::2]), max(values[0::2])
    top, bottom = min(values[1::2]), max(values[1::2])
    if len(values) not in (4, 8) or left >= right or top >= bottom:
        raise ValueError(f"{str(row)[:80]} is no box")
    return left, top, right, bottom


def touched(box: Box, size: tuple[int, int], grid: tuple[int, int]) -> np.ndarray:
    """Cells of a grid (rows, columns) that a box overlaps, bool (rows, columns).

    `size` is the (width, height) of the picture in pixels; parts of the box beyond it are ignored.
    Raises `OptionError` if all of it is.
    """
    (width, height), (rows, columns) = size, grid
    left, top, right, bottom = box
    if right <= 0 or bottom <= 0 or left >= width or top >= height:
        raise OptionError(
            f"the box {box} is outside of the picture, which has {width} × {height} pixels. Boxes "
            "must be in pixels (left, top, right, bottom) of the file that is given as the picture."
        )
    out = np.zeros(grid, bool)
    first_row, first_column = int(max(0, top) * rows / height), int(max(0, left) * columns / width)
    last_row = math.ceil(min(bottom, height) * rows / height)
    last_column = math.ceil(min(right, width) * columns / width)
    out[first_row:last_row, first_column:last_column] = True
    return out


def words_kept(kept: np.ndarray, boxes: Sequence[Box], size: tuple[int, int]) -> float:
    """Share of boxes that keep at least half of their cells; `kept` (rows, columns) is bool."""
    cells = [touched(box, size, (kept.shape[0], kept.shape[1])) for box in boxes]
    return float(np.mean([kept[at].mean() >= HALF for at in cells]))
