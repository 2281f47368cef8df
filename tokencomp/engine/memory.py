"""What the rows of a cache show of pictures: with what later pictures are compared.

Two signals of reducers read it: `SEEN`, the pixels of cells (`delta`), and `FRAMES`, the features
of the last frame (`timechat`). The first layer of a cache with rows holds the memory, in its
`RowMap`. It changes as the rows do, and in no other way: a turn appends (`append`), a crop or an
eviction removes rows (`cut`), beams and selected samples reorder it (`select`). A picture that
comes by a way that is not compared, as features or without a stage, makes it unknown (`forget`).

A patch counts as shown if the decoder holds its row, in every layer. Pictures of four cells, and
which row shows each of them; in the second picture cells 1 and 2 differ, and a budget leaves one:

    first picture              values  a0 a1 a2 a3      rows  3  4  5  6
    second picture             values  a0 a1 b2 a3      rows  3  4 11  6
    row 4 is evicted           values  a0  . b2 a3      rows  3 -1 10  5
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokencomp.tokens.signals import Signal
from tokencomp.tokens.tokens import Modality

Key = tuple[Any, ...]
"""Signal, modality, and what pictures that are compared have in common: size, part of the item."""


@dataclass(frozen=True, eq=False)
class Shown:
    """What is shown at every place of pictures of one key."""

    values: Tensor  # pixels or features, (places, d)
    rows: Tensor  # row of the first cache layer that shows them, int64 (places,); -1: none

    def known(self) -> Tensor:
        """The values; NaN where nothing is shown."""
        missing = (self.rows < 0).to(self.values.device)
        return self.values.masked_fill(missing[:, None], torch.nan)


@dataclass(frozen=True, eq=False)
class Entered:
    """A picture or video of a call, which later ones are compared with if the decoder holds it."""

    sample: int  # where it is remembered, with `key`
    key: Key
    # Column of the call of every patch, (frames, places).
    columns: np.ndarray[Any, np.dtype[np.int64]]
    # Of one frame, (places, d); or a function that takes the numbers of patches in the picture,
    # int64 (places,), and returns theirs.
    values: Tensor | Callable[[Tensor], Tensor]
    # First column and end of a span whose dropped patches count as shown as long as its last row is
    # held; None: dropped patches are not shown.
    span: tuple[int, int] | None = None

    def shown(self, rows: Tensor, before: Shown | None) -> Shown:
        """What is shown after it; `before`: what was shown of its key.

        `rows` has the row of every column of the call, int64 (columns,), -1: not held.
        """
        # (frames, places): the column of every patch, then its row.
        numbers = torch.from_numpy(self.columns).to(rows.device)
        # Rows ascend with the frames, so that the largest is in the last frame that is held.
        newest, frame = rows[numbers].max(0)
        # Signals of whole frames: a frame counts as shown while its last row is held.
        if self.span is not None:
            newest = torch.where(newest < 0, rows[slice(*self.span)].max(), newest)
        if isinstance(self.values, Tensor):
            return Shown(self.values, newest)
        places = len(newest)
        values = self.values(frame * places + torch.arange(places, device=rows.device)).detach()
        if before is None:
            return Shown(values, newest)
        # Places that this picture does not show keep what an earlier one showed.
        new, held = newest >= 0, (newest >= 0).to(values.device)
        values = torch.where(held[:, None], values, before.values.to(values.device))
        return Shown(values, torch.where(new, newest, before.rows.to(rows.device)))


@dataclass(frozen=True, eq=False)
class Memory:
    """What the rows of a cache show of pictures, by sample."""

    samples: tuple[dict[Key, Shown], ...] = ()  # by key, of the samples at the last prompt
    order: Tensor | None = None  # number in `samples` of every sample of the cache, int64 (B,)
    end: int = 0  # no row from here on shows anything

    def of(self, batch: int) -> list[dict[Key, Shown]]:
        """What is shown in every sample of a batch; nothing in a batch of another size."""
        if self.order is None or len(self.order) != batch:
            return [{} for _ in range(batch)]
        return [self.samples[i] for i in self.order.tolist()]

    def since(self, before: Memory) -> Tensor:
        """Rows that show what a prompt of one sample shows, int64; `before`: the memory before."""
        (old,), (new,) = before.of(1), self.of(1)
        rows = [shown.rows for key, shown in new.items() if shown is not old.get(key)]
        found = torch.cat(rows) if rows else torch.zeros(0, dtype=torch.int64)
        return found[found >= 0]

    # -- what changes it ------------------------------------------------------------------------

    def append(self, entered: Sequence[Entered], rows: Tensor, end: int) -> Memory:
        """The memory after a call, when the cache has `end` rows.

        `rows` has the row of the first cache layer of every column of the call, int64 (B, columns),
        -1: not held.
        """
        samples = [dict(sample) for sample in self.of(len(rows))]
        for e in entered:
            samples[e.sample][e.key] = e.shown(rows[e.sample], samples[e.sample].get(e.key))
        order = torch.arange(len(rows), device=rows.device)
        return Memory(tuple(samples), order, end) if any(samples) else Memory()

    def cut(self, rows: Tensor) -> Memory:
        """The memory of a cache that keeps only these rows, int64 (n,), ascending."""
        if not rows.numel():
            return Memory()

        def moved(shown: Shown) -> Shown:
            kept = rows.to(shown.rows.device)
            # Rows 3 5 6 kept of 0 … 6: row 5 becomes row 1, and row 4 is no longer held (-1).
            number = torch.searchsorted(kept, shown.rows).clamp(max=len(kept) - 1)
            return Shown(shown.values, torch.where(kept[number] == shown.rows, number, -1))

        samples = [{key: moved(shown) for key, shown in s.items()} for s in self.samples]
        held = [{k: x for k, x in s.items() if bool((x.rows >= 0).any())} for s in samples]
        return replace(self, samples=tuple(held), end=len(rows))

    def select(self, change: Callable[[Tensor], Tensor]) -> Memory:
        """The memory of reordered, repeated or selected samples, see `RowMap.select`."""
        return self if self.order is None else replace(self, order=change(self.order))

    def forget(
        self, modalities: Collection[Modality], but: Collection[tuple[Signal, Modality]] = ()
    ) -> Memory:
        """The memory without pictures of some modalities, except `but` those of a signal."""

        def known(key: Key) -> bool:
            return key[1] not in modalities or key[:2] in but

        samples = [{k: x for k, x in sample.items() if known(k)} for sample in self.samples]
        return replace(self, samples=tuple(samples)) if any(samples) else Memory()
