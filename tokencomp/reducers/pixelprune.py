"""PixelPrune: drop what its kept neighbours in the picture predict."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokencomp.reducers._pixels import differ
from tokencomp.reducers._repeats import DropsRepeats
from tokencomp.reducers.registry import register_reducer
from tokencomp.tokens.tokens import Tokens


@register_reducer("pixelprune")
@dataclass(frozen=True)
class PixelPrune(DropsRepeats):
    """Drop cells that kept neighbours in the picture predict (PixelPrune, 2604.00886).

    For documents and screens with plain areas. With threshold 0 the picture can be rebuilt from
    the cells that are kept. Every step of a video is a picture.

    Attributes
    ----------
    threshold, then
        See `DropsRepeats`.

    Notes
    -----
    The published rule, with the largest difference as its distance (the default of the release).
    """

    summary = "drop what neighbours in the picture predict, before the vision tower (2604.00886)"

    def repeats(self, tokens: Tokens, limit: float | Tensor) -> Tensor:
        keep = []
        for span in tokens:
            ((t, h, w),) = span.grids
            pictures = span.features.view(t, h, w, -1)
            keep.append(unpredicted_cells(pictures, limit).flatten())
        return ~torch.cat(keep)


def unpredicted_cells(pictures: Tensor, limit: float | Tensor = 0) -> Tensor:
    """Which cells of pictures of one size are not predicted by their neighbours, bool (n, h, w).

    As in JPEG-LS, the prediction of a cell is the cell to its left, or the one above it if a
    vertical edge passes: if the upper-left cell equals the left one and not the upper one. A cell
    that equals its prediction is dropped, and later cells are predicted from the prediction in its
    place, so that slow changes add up. The first cell is always kept.

    `pictures` (n, h, w, d) are the pixels of the cells, and `limit` is the largest difference of
    two that counts as equal, in the unit of the pixels. At 0 the pictures can be rebuilt from the
    kept cells without loss.
    """
    n, h, w, _ = pictures.shape
    exact = not isinstance(limit, Tensor) and limit == 0
    known = pictures if exact else pictures.clone()  # the cell that represents every cell
    keep = torch.ones(n, h, w, dtype=torch.bool, device=pictures.device)
    row, column = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    # A cell depends on those to its left and above it, so all cells of an antidiagonal are decided
    # at once. Without a threshold a prediction equals its cell, so `known` never changes.
    step = (row + column > 0).long() if exact else row + column
    for k in range(1, int(step.max()) + 1):
        r, c = (index[step == k].to(pictures.device) for index in (row, column))
        above, before = (r - 1).clamp(min=0), (c - 1).clamp(min=0)
        left, upper, corner = known[:, r, before], known[:, above, c], known[:, above, before]
        edge = ~differ(corner, left, limit) & differ(corner, upper, limit) & (r > 0)
        predicted = torch.where((edge | (c == 0))[..., None], upper, left)
        new = keep[:, r, c] = differ(pictures[:, r, c], predicted, limit)
        if not exact:
            known[:, r, c] = torch.where(new[..., None], pictures[:, r, c], predicted)
    return keep
