"""The rows of a session's cache by item and place, and the order of eviction."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from tokencomp.tokens.tokens import VisualSpan

TEXT = -1
"""Item number of system text and of what was said, which never go."""
NOWHERE = -1
"""Place of rows that are no patch of a picture."""


@dataclass(frozen=True)
class Held:
    """Rows of the widest layer, one entry per row, in the order of the conversation.

    Attributes
    ----------
    columns : Tensor of int64, shape (n,)
        Column of the uncompressed sequence.
    items : Tensor of int64, shape (n,)
        Number of the last item that shows the row; `TEXT` for rows that are never evicted.
        Timestamps and delimiters belong to their item. A patch is shown by later items too whose
        pictures lack it, because it has not changed (the reducer "delta").
    places : Tensor of int64, shape (n,)
        Equal for patches at the same place of pictures of one shape; `NOWHERE` for other rows.
    appearance : Tensor, shape (n, d), or shape (n, 0)
        Features of patches at the decoder's input, if the policy compares them.
    """

    columns: Tensor
    items: Tensor
    places: Tensor
    appearance: Tensor

    def __len__(self) -> int:
        return self.columns.numel()

    @property
    def texts(self) -> int:
        """Number of rows that are never evicted."""
        return int((self.items == TEXT).sum())

    def joined(self, new: Held) -> Held:
        wide = max(self.appearance, new.appearance, key=lambda x: x.shape[1])
        appearance = torch.cat([_padded(x, wide) for x in (self.appearance, new.appearance)])
        return Held(
            torch.cat([self.columns, new.columns]),
            torch.cat([self.items, new.items]),
            torch.cat([self.places, new.places]),
            appearance,
        )

    def rows(self, index: Tensor) -> Held:
        return Held(*(getattr(self, f.name)[index] for f in fields(self)))


def _padded(appearance: Tensor, wide: Tensor) -> Tensor:
    """Pad missing appearance with zeros of the given width and dtype."""
    same = appearance.shape[1] == wide.shape[1]
    return appearance if same else wide.new_zeros(len(appearance), wide.shape[1])


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
        part, before = 0, None
        for span in spans:
            part = part + 1 if span.item == before else 0
            before = span.item
            t, h, w = span.grid
            patches = (~span.special_mask()).nonzero()[:, 0]
            if not span.grid_known or len(patches) != t * h * w:
                continue
            key = (span.modality, h, w, part)
            if key not in self._first:
                self._first[key], self._next = self._next, self._next + h * w
            places[span.start + patches] = self._first[key] + torch.arange(h * w).repeat(t)
        return places


def newest_of(places: Tensor) -> Tensor:
    """The newest row of the place of every row, int64, shape (n,)."""
    rows, slots = torch.arange(len(places), device=places.device), places - NOWHERE
    last = rows.new_zeros(int(slots.max()) + 1 if len(slots) else 0)
    return last.scatter_reduce(0, slots, rows, "amax")[slots]


def newest(places: Tensor) -> Tensor:
    """Which rows are the newest ones of their place, bool, shape (n,); never without a place."""
    rows = torch.arange(len(places), device=places.device)
    return (newest_of(places) == rows) & (places != NOWHERE)


Order = Callable[[Held], Tensor]


def oldest(held: Held) -> Tensor:
    """Rows of media, first those that were last shown longest ago."""
    rows = (held.items != TEXT).nonzero()[:, 0]
    return rows[torch.sort(held.items[rows], stable=True).indices]


def redundant(held: Held) -> Tensor:
    """Rows of media, first those whose place looks the same in its newest row.

    A patch is compared (cosine) with the newest cached row of its place; the more similar, the
    earlier it is evicted, ties by age. Then patches whose place has no newer row, the oldest first.
    Timestamps and delimiters are evicted with the last patch of their item. The age of a patch is
    that of the last item that shows it.
    """
    n, media = len(held), held.items != TEXT
    patch = media & (held.places != NOWHERE)
    rows = patch.nonzero()[:, 0]
    alike = _alike(held.places[rows], held.appearance[rows].float())
    age = torch.sort(held.items[rows], stable=True).indices
    order = rows[age][torch.sort(alike[age], descending=True, stable=True).indices]
    rank = torch.full((n,), -1, device=rows.device)
    rank[order] = torch.arange(len(order), device=rows.device)
    other = (media & ~patch).nonzero()[:, 0]
    last = rank.new_full((int(held.items.max()) + 1,), -1)
    last.scatter_reduce_(0, held.items[rows], rank[rows], "amax")
    rank[other] = last[held.items[other]]
    # The patch that closes an item comes before its delimiters: both have its rank.
    going = media.nonzero()[:, 0]
    key = 2 * rank[going] + (held.places[going] == NOWHERE)
    return going[torch.sort(key, stable=True).indices]


def _alike(places: Tensor, appearance: Tensor) -> Tensor:
    """Cosine of every row with the newest row of its place, float32 (n,); -2 for the newest."""
    last = newest_of(places)
    cosine = torch.nn.functional.cosine_similarity(appearance, appearance[last], dim=-1)
    # Rounded, so that of equal pictures the oldest goes and not one that rounding picks.
    return torch.where(newest(places), -2.0, cosine.round(decimals=4))


POLICIES: dict[str, Order] = {"oldest": oldest, "redundant": redundant}
