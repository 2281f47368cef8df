"""Delta: drop what equals the last kept cell at its place in an earlier picture."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokencomp.reducers._pixels import differ
from tokencomp.reducers._repeats import DropsRepeats
from tokencomp.reducers.registry import register_reducer
from tokencomp.tokens.signals import SEEN
from tokencomp.tokens.tokens import Tokens


@register_reducer("delta")
@dataclass(frozen=True)
class Delta(DropsRepeats):
    """Drop cells that equal the last kept cell at their place in an earlier picture.

    For screens, and for all pictures of a fixed camera. Cells are compared with those of earlier
    pictures of the same size in the prompt, the conversation (on one KV cache, as in a `Session`)
    or the video: by the pixels, before the vision tower. The first picture of a size is kept whole.
    Nothing earlier changes, so prefix caches stay valid. In a cache a cell counts as kept if the
    decoder holds its row, so that what a budget drops comes again in the next turn.

    Scrolling and panning move all cells, so that all of them are kept.

    Attributes
    ----------
    threshold, then
        See `DropsRepeats`.
    """

    summary = "drop what equals the last kept picture at its place, before the vision tower (ours)"
    needs = frozenset({SEEN})

    def repeats(self, tokens: Tokens, limit: float | Tensor) -> Tensor:
        new = []
        seen = tokens.seen or [{} for _ in tokens.lengths]
        for span, kept in zip(tokens, seen, strict=True):
            ((t, h, w),) = span.grids
            (key,) = span.keys
            pictures = span.features.view(t, h * w, -1)
            keep, last = new_cells(pictures, kept.get(key), limit)
            kept[key] = last.clone()  # a view would keep the pixels of all pictures alive
            # Where nothing is new, `reduce` keeps the first cell.
            kept[key][0] = torch.where(keep.any(), last[0], pictures[0, 0])
            new.append(keep.flatten())
        return ~torch.cat(new)


def new_cells(
    pictures: Tensor, last: Tensor | None = None, limit: float | Tensor = 0
) -> tuple[Tensor, Tensor]:
    """Which cells of pictures of one size differ from the last kept cell at their place.

    Every cell of the pixels `pictures` (n, cells, d), in the order in which they are shown, is
    compared with the one last *kept*, so that slow changes add up. `last` (cells, d) was kept last
    at every place of earlier pictures, NaN where nothing was; without it the first picture is kept
    whole. `limit` is the largest difference that counts as equal, in the unit of the pixels.
    Returns the mask of kept cells, bool (n, cells), and `last` after these pictures.
    """
    keep = []
    for cells in pictures:
        if last is None:
            new, last = torch.ones(len(cells), dtype=torch.bool, device=cells.device), cells
        else:
            new = differ(cells, last, limit)
            last = torch.where(new[:, None], cells, last)
        keep.append(new)
    assert last is not None
    return torch.stack(keep), last
