"""Counts on the cells of receipts."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from benchmarks.screens.receipts import CELL, copies, resized

ROWS, COLUMNS = 8, 10


def desktop(seed: int) -> np.ndarray:
    """A picture whose cells all differ, uint8 (height, width, 3)."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (ROWS * CELL, COLUMNS * CELL, 3), dtype=np.uint8)


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
