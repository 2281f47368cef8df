"""Words kept: boxes of OCR files, and their cells, against a count of single pixels."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tokencomp.errors import OptionError
from tokencomp.evaluation.coverage import load_boxes, touched, words_kept

BOXES = [(3.0, 4.0, 60.0, 20.0), (10.0, 30.0, 30.0, 44.0)]
CORNERS = ["3,4,60,4,60,20,3,20,TOTAL, 5% OFF", "10,30,30,30,30,44,10,44,"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", "\n\n".join(CORNERS) + "\n"),
        ("a.txt", "\ufeff" + "\r\n".join(CORNERS)),
        ("a.json", json.dumps([[*map(int, box)] for box in BOXES])),
        ("a.json", json.dumps([{"text": "x", "box": box} for box in BOXES])),
        ("a.json", json.dumps([[float(v) for v in row.split(",")[:8]] for row in CORNERS])),
    ],
)
def test_forms_of_a_file(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert load_boxes(tmp_path / name) == BOXES


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("none.csv", None, "No such file"),
        ("a.csv", "\n", "has no boxes"),
        ("a.csv", "left,top,right,bottom\n", "'left'"),
        ("a.csv", CORNERS[0] + "\n1,2,3\n", "no box"),
        ("a.csv", "5,5,5,5,5,9,5,9,thin", "no box"),
        ("a.json", "[[1, 2, 3", "a.json"),
        ("a.json", '{"box": [1, 2, 3, 4]}', "a.json"),
        ("a.json", '[{"bbox": [1, 2, 3, 4]}]', "'bbox'"),
        ("a.json", '[[1, 2, 3, "x"]]', "'x'"),
        ("a.json", "[1234]", "a.json"),
    ],
)
def test_wrong_files_say_what_is_allowed(tmp_path, name, text, said):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(OptionError, match=said) as caught:
        load_boxes(tmp_path / name)
    assert "x1,y1" in str(caught.value)


def cells_with_a_pixel(box, size, grid):
    """Cells that share an area with a pixel of the box, pixel by pixel in whole numbers."""
    out = np.zeros(grid, bool)
    for y in range(max(0, box[1]), min(size[1], box[3])):
        rows = y * grid[0] // size[1], ((y + 1) * grid[0] - 1) // size[1]
        for x in range(max(0, box[0]), min(size[0], box[2])):
            for column in (x * grid[1] // size[0], ((x + 1) * grid[1] - 1) // size[0]):
                out[rows, column] = True
    return out


def test_cells_and_words_by_single_pixels():
    """Sizes that the grid divides or not; boxes inside, at the edges and over them."""
    rng = np.random.default_rng(0)
    for size, grid in (((64, 48), (6, 8)), ((50, 37), (5, 7)), ((8, 8), (1, 1))):
        kept = rng.random(grid) < 0.5
        boxes = []
        while len(boxes) < 60:
            left, top, width, height = rng.integers((-4, -4, 1, 1), (*size, 30, 20)).tolist()
            box = (left, top, left + width, top + height)
            if box[2] > 0 and box[3] > 0:
                boxes.append(box)
        right = 0
        for box in boxes:
            cells = cells_with_a_pixel(box, size, grid)
            assert (touched(box, size, grid) == cells).all(), (box, size, grid)
            right += 2 * (kept & cells).sum() >= cells.sum()
        assert words_kept(kept, boxes, size) == pytest.approx(right / len(boxes))


def test_a_box_of_another_picture_is_refused():
    with pytest.raises(OptionError, match="64 × 48 pixels"):
        touched((64, 0, 70, 10), (64, 48), (6, 8))
