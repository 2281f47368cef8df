"""The rows of a session's cache by item and place, and the order of eviction."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, pad

from tokencomp.tokens.tokens import VisualSpan

TEXT = -1
"""Item number of system text and of what was said, which never go."""
NOWHERE = -1
"""Place of rows that are no patch of a picture."""


@dataclass(frozen=True)
class Held:
    """Rows of the widest layer, one entry per row, in the order of the conversation.

    `columns` of the uncompressed sequence, int64 (n,). `items`, int64 (n,): number of the last item
    that shows the row, `TEXT` for rows that are never evicted. Timestamps and delimiters belong to
    their item; a patch is shown by later items too whose pictures lack it, because it has not
    changed (the reducer "delta"). `places`, int64 (n,): equal for patches at the same place of
    pictures of one shape, `NOWHERE` for other rows. `appearance` (n, d): features of patches at the
    decoder's input, if the policy compares them, else (n, 0).
    """

    columns: Tensor
    items: Tensor
    places: Tensor
    appearance: Tensor

    def __len__(self) -> int:
        return self.columns.numel()

    def joined(self, new: Held) -> Held:
        """All rows; those without appearance get zeros where others have one."""
        both = self.appearance, new.appearance
        wide = max(both, key=lambda x: x.shape[1])
        missing = [wide.shape[1] - x.shape[1] for x in both]
        padded = [pad(x.to(wide), (0, n)) for x, n in zip(both, missing, strict=True)]
        return Held(
            torch.cat([self.columns, new.columns]),
            torch.cat([self.items, new.items]),
            torch.cat([self.places, new.places]),
            torch.cat(padded),
        )

    def rows(self, index: Tensor) -> Held:
        return Held(*(getattr(self, f.name)[index] for f in fields(self)))


class PatchPlaces:
    """Numbers places, shared by all patches at the same place of pictures of one shape.

    Frames of videos of one shape share places, and so do images of one shape: tile k of an image
    and tile k of the next.
    """

    def __init__(self) -> None:
        self._first: dict[tuple[Any, ...], int] = {}
        self._next = 0

    def of(self, spans: Sequence[VisualSpan], width: int) -> Tensor:
        """Places of the columns of a call, int64 (width,); `NOWHERE` if unknown."""
        places = torch.full((width,), NOWHERE)
        for span in spans:
            t, h, w = span.grid
            patches = (~span.special_mask()).nonzero()[:, 0]
            if not span.grid_known or len(patches) != t * h * w:
                continue
            key = (span.modality, h, w, span.tile)
            if key not in self._first:
                self._first[key], self._next = self._next, self._next + h * w
            places[span.start + patches] = self._first[key] + torch.arange(h * w).repeat(t)
        return places


def newest_of(places: Tensor) -> Tensor:
    """The newest row of the place of every row, int64, shape (n,)."""
    rows, slots = torch.arange(len(places), device=places.device), places - NOWHERE
    last = rows.new_zeros(int(slots.max()) + 1 if len(slots) else 0)
    return last.scatter_reduce(0, slots, rows, "amax")[slots]


Order = Callable[[Held], Tensor]


def oldest(held: Held) -> Tensor:
    """Rows of media, the least recently shown first."""
    rows = (held.items != TEXT).nonzero()[:, 0]
    return rows[torch.sort(held.items[rows], stable=True).indices]


def redundant(held: Held) -> Tensor:
    """Rows of media, first those whose place looks the same in its newest row.

    A patch is compared (cosine) with the newest cached row of its place; the more similar, the
    earlier it is evicted, ties by age. Then patches whose place has no newer row, the oldest first.
    Timestamps and delimiters are evicted with the last patch of their item. The age of a patch is
    the age of the last item that shows it.
    """
    n, media = len(held), held.items != TEXT
    patch = media & (held.places != NOWHERE)
    rows = patch.nonzero()[:, 0]
    last, seen = newest_of(held.places[rows]), held.appearance[rows].float()
    cosine = cosine_similarity(seen, seen[last], dim=-1)
    # Rounded, so that among equal pictures the oldest is evicted, whatever rounding does.
    newest = last == torch.arange(len(rows), device=rows.device)
    alike = torch.where(newest, -2.0, cosine.round(decimals=4))
    age = torch.sort(held.items[rows], stable=True).indices
    order = rows[age][torch.sort(alike[age], descending=True, stable=True).indices]
    rank = torch.full((n,), -1, device=rows.device)
    rank[order] = torch.arange(len(order), device=rows.device)
    other = (media & ~patch).nonzero()[:, 0]
    closing = rank.new_full((int(held.items.max()) + 1,), -1)
    closing.scatter_reduce_(0, held.items[rows], rank[rows], "amax")
    rank[other] = closing[held.items[other]]
    # The patch that closes an item comes before its delimiters: both have its rank.
    going = media.nonzero()[:, 0]
    key = 2 * rank[going] + (held.places[going] == NOWHERE)
    return going[torch.sort(key, stable=True).indices]


POLICIES: dict[str, Order] = {"oldest": oldest, "redundant": redundant}
