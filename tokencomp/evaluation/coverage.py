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
    """Boxes of a CSV or JSON file, in its order.

    Parameters
    ----------
    path
        A name that ends in .json is JSON: a list of boxes, which are four numbers (left, top,
        right, bottom) or eight (the corners), or of objects with such a "box". Any other file has
        a row per box: eight numbers, then whatever text, commas included.

    Raises
    ------
    OptionError
        The file cannot be read, has no box, or one that is not of this form.
    """
    try:
        text = path.read_text(encoding="utf-8-sig", errors="replace")
    except OSError as error:
        raise OptionError(f"--boxes {path}: {error.strerror}. Give {FORMS}.") from error
    rows = _of_json(path, text) if path.suffix.lower() == ".json" else _of_csv(text)
    boxes = []
    for number, row in rows:
        box = _box(row)
        if box is None:
            raise OptionError(f"{path}, box {number}: {str(row)[:80]!r} is no box. Give {FORMS}.")
        boxes.append(box)
    if not boxes:
        raise OptionError(f"{path} has no boxes. Give {FORMS}.")
    return boxes


def _of_csv(text: str) -> list[tuple[int, Any]]:
    """The corners in every row that is not empty; the whole line if it has fewer numbers."""
    rows = [(k, line, line.split(",", 8)[:8]) for k, line in enumerate(text.splitlines(), 1)]
    return [(k, row if len(row) == 8 else line) for k, line, row in rows if line.strip()]


def _of_json(path: Path, text: str) -> list[tuple[int, Any]]:
    try:
        rows = json.loads(text)
    except ValueError as error:
        raise OptionError(f"{path} is no JSON: {error}. Give {FORMS}.") from error
    if not isinstance(rows, list):
        raise OptionError(f"{path} holds a {type(rows).__name__}, not a list. Give {FORMS}.")
    return [(k, r.get("box") if isinstance(r, dict) else r) for k, r in enumerate(rows, 1)]


def _box(row: Any) -> Box | None:
    """The box around four or eight numbers; None for anything else, or without an area."""
    if not isinstance(row, Sequence) or isinstance(row, str) or len(row) not in (4, 8):
        return None
    try:
        values = [float(v) for v in row]
    except (TypeError, ValueError):
        return None
    left, right = min(values[0::2]), max(values[0::2])
    top, bottom = min(values[1::2]), max(values[1::2])
    return (left, top, right, bottom) if left < right and top < bottom else None


def touched(box: Box, size: tuple[int, int], grid: tuple[int, int]) -> np.ndarray:
    """Cells that a box overlaps, bool (rows, columns).

    Parameters
    ----------
    box
        In pixels of the picture; parts beyond its edges are ignored.
    size
        (width, height) of the picture in pixels.
    grid
        (rows, columns) of equal cells.

    Raises
    ------
    OptionError
        The box is outside of the picture.
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
    """Share of boxes of which at least half of the cells are kept.

    Parameters
    ----------
    kept
        bool (rows, columns).
    boxes, size
        See :func:`touched`.
    """
    cells = [touched(box, size, (kept.shape[0], kept.shape[1])) for box in boxes]
    return float(np.mean([kept[at].mean() >= HALF for at in cells]))
