"""Which cells repeat what was kept, against loops over single cells."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from tokencomp.reducers._pixels import cells_of
from tokencomp.reducers.delta import new_cells
from tokencomp.reducers.pixelprune import unpredicted_cells


def screens(n: int, h: int, w: int, levels: int, seed: int) -> Tensor:
    """Pictures (n, h, w, 4) of few values, so that many cells are equal or nearly so."""
    rng = np.random.default_rng(seed)
    noise = rng.integers(0, 3, (n, h, w, 4)) * (rng.random((n, h, w, 1)) < 0.4)
    return torch.from_numpy((5 * rng.integers(0, levels, (n, h, w, 1)) + noise).astype(np.uint8))


def equal(a: np.ndarray, b: np.ndarray, limit: int) -> bool:
    return int(np.abs(a.astype(int) - b.astype(int)).max()) <= limit


@pytest.mark.parametrize("limit", [0, 1, 3])
@pytest.mark.parametrize("seed", range(4))
def test_delta_compares_with_the_last_kept_cell(limit: int, seed: int) -> None:
    pictures = screens(7, 3, 5, 2, seed).flatten(1, 2)
    last: dict[int, np.ndarray] = {}
    expected = np.zeros((7, 15), bool)
    for i, cells in enumerate(pictures.numpy()):
        for place, cell in enumerate(cells):
            if place not in last or not equal(cell, last[place], limit):
                expected[i, place], last[place] = True, cell
    keep, after = new_cells(pictures, None, limit)
    assert (keep.numpy() == expected).all() and 15 < keep.sum() < keep.numel()
    assert (after.numpy() == np.stack([last[p] for p in range(15)])).all()
    # Picture by picture, as the turns of a conversation bring them.
    first, known = new_cells(pictures[:3], None, limit)
    rest, known = new_cells(pictures[3:], known, limit)
    assert torch.equal(torch.cat([first, rest]), keep) and torch.equal(known, after)


@pytest.mark.parametrize("limit", [0, 1, 3])
@pytest.mark.parametrize("shape", [(9, 11), (1, 8), (8, 1), (1, 1)])
def test_pixelprune_keeps_what_the_published_rule_keeps(limit: int, shape: tuple[int, int]) -> None:
    pictures = screens(3, *shape, 2, seed=sum(shape))
    keep = unpredicted_cells(pictures, limit)
    for picture, kept in zip(pictures.numpy(), keep.numpy(), strict=True):
        rebuilt = np.zeros_like(picture)
        for r in range(shape[0]):
            for c in range(shape[1]):
                x = picture[r, c]
                if r == 0 and c == 0:
                    guess = None
                elif r == 0:
                    guess = rebuilt[r, c - 1]
                elif c == 0:
                    guess = rebuilt[r - 1, c]
                else:
                    a, b, corner = rebuilt[r, c - 1], rebuilt[r - 1, c], rebuilt[r - 1, c - 1]
                    vertical = equal(corner, a, limit) and not equal(corner, b, limit)
                    guess = b if vertical else a
                new = guess is None or not equal(x, guess, limit)
                assert kept[r, c] == new
                rebuilt[r, c] = x if new else guess
        assert equal(rebuilt, picture, limit)  # nothing is lost beyond the threshold
    assert len(picture) * picture.shape[1] == 1 or keep.sum() < keep.numel()


def test_cells_of_an_array() -> None:
    picture = torch.arange(5 * 7 * 3, dtype=torch.uint8).view(5, 7, 3)
    cells = cells_of(picture, 2)
    assert cells.shape == (2, 3, 12)
    assert torch.equal(cells[1, 2], picture[2:4, 4:6].flatten())
