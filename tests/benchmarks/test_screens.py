"""Counts on recorded screens and receipts, on pictures of which it is known what changed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.screens.__main__ import clicks, measure_session, summary
from benchmarks.screens.cells import CELL, SHARE, copies, differences, shift
from benchmarks.screens.receipts import resized

ROWS, COLUMNS = 8, 10


def desktop(seed: int) -> np.ndarray:
    """A picture whose cells all differ, uint8 (height, width, 3)."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (ROWS * CELL, COLUMNS * CELL, 3), dtype=np.uint8)


@pytest.fixture
def session(tmp_path: Path) -> list[Path]:
    """Four screenshots: changes of 8 and 9 at known cells, one of another size, and a click."""
    first = desktop(0) // 2 + 20
    second, third = first.copy(), first.copy()
    second[3 * CELL + 5, 2 * CELL + 7, 1] += 9  # row 3, column 2
    second[0, 0, 0] += 8
    third[3 * CELL + 5, 2 * CELL + 7, 1] += 9
    third[0, 0, 0] -= 8  # 16 from the second, 8 from the last kept one
    third[7 * CELL : 8 * CELL, 9 * CELL : 10 * CELL] = 255
    folder = tmp_path / "data" / "one" / "images"
    folder.mkdir(parents=True)
    for k, picture in enumerate((first, second, third, first[:CELL])):
        Image.fromarray(picture).save(folder / f"{k}.jpg", format="PNG")
    action = {
        "action_type": "MouseAction",
        "mouse_action_type": "click",
        "mouse_position": {"width": 2 * CELL + 1, "height": 4 * CELL - 1},
    }
    steps = {"saved_image_name": "2.jpg", "actions": [action, action]}
    (folder.parent / "step.json").write_text(json.dumps(steps))
    return sorted(folder.glob("*.jpg"))


def test_counts_of_known_changes(session: list[Path]) -> None:
    found = measure_session(session)
    cells = ROWS * COLUMNS
    assert found["tokens"] == [cells, cells, cells, COLUMNS]
    # At 0 the corner changes twice; the click's cell, only once.
    assert found["kept"] == {0: [cells, 2, 2, 10], 8: [cells, 1, 1, 10], 16: [cells, 0, 1, 10]}
    same = {0: 1 - 2 / cells, 8: 1 - 2 / cells, 16: 1 - 1 / cells}
    assert found["pairs"][1]["same"] == pytest.approx(same)
    assert list(clicks(session[0].parents[1])) == [("2.jpg", 65, 127, "click")]
    assert found["clicks"] == [["click", 2, 1]]  # kept last in the screenshot before
    counts = summary([found])
    assert counts["clicks"] == {"places": 1, "in the last screenshot": 0, "in an older one": 1}
    assert counts["kept"]["8"]["tokens"] == (cells + 1 + 1 + 10) / (3 * cells + 10)


@pytest.mark.parametrize("rows", [-40, 24, 64])
def test_a_scroll_is_found(rows: int) -> None:
    page = torch.from_numpy(np.concatenate([desktop(0), desktop(1)]))
    middle, height = ROWS * CELL // 2, ROWS * CELL
    before, after = (page[at : at + height] for at in (middle, middle + rows))
    moved, share = shift(before, after, differences(before, after) > 8)
    covered = (height - abs(rows)) // CELL  # rows of cells of which all was visible before
    assert moved == rows and share == covered / ROWS


def test_another_screen_is_no_scroll() -> None:
    before, after = torch.from_numpy(desktop(0)), torch.from_numpy(desktop(1))
    assert shift(before, after, differences(before, after) > 8)[1] < SHARE


def test_copies_are_equal_to_an_earlier_cell() -> None:
    picture = desktop(0)
    picture[CELL : 2 * CELL, :CELL] = picture[:CELL, CELL : 2 * CELL]
    picture[2 * CELL : 3 * CELL, :CELL] = picture[:CELL, CELL : 2 * CELL]
    assert copies(torch.from_numpy(picture)).nonzero().tolist() == [[1, 0], [2, 0]]


def test_pages_are_whole_cells_and_never_larger() -> None:
    small, large = (Image.new("RGB", size) for size in ((100, 70), (2000, 3000)))
    assert resized(small, 784).shape == (64, 96, 3)
    height, width, _ = resized(large, 784).shape
    assert height % CELL == width % CELL == 0 and 0.9 * 784 < height * width / CELL**2 <= 784
