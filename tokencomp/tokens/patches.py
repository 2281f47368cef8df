"""The patches of a batch of spans: what reducers choose from, all spans at once.

Lengths, budgets and places of grids are numbers on the host. What follows from them alone is
computed there and moves to the device as one table, so that the number of launches does not depend
on the number of spans.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokencomp.errors import PlanError
from tokencomp.tokens.reduction import Reduction
from tokencomp.tokens.spans import SpanBatch
from tokencomp.tokens.stacks import HostIndex


@dataclass
class Patches:
    """The patches of a batch: all of its tokens but the special ones.

    Attributes
    ----------
    lengths, budgets
        Patches of every span, and how many of them stay.
    rows : Tensor of int64, shape (patches,), or None
        Their rows in the batch, ascending; None: all rows are patches.
    special : Tensor of int64, shape (special tokens,), or None
        The other rows.
    """

    batch: SpanBatch
    lengths: list[int]
    budgets: list[int]
    rows: Tensor | None = None
    special: Tensor | None = None

    @classmethod
    def of(cls, batch: SpanBatch, keeps: Sequence[int]) -> Patches:
        """The patches of `batch`, of whose tokens `keeps` stay."""
        lengths = [n - fixed for n, fixed in zip(batch.lengths, batch.fixed, strict=True)]
        budgets = [keep - fixed for keep, fixed in zip(keeps, batch.fixed, strict=True)]
        if batch.special is None:
            return cls(batch, lengths, budgets)
        # Sorting instead of `nonzero`, whose length the host would have to read.
        order = batch.special.to(torch.uint8).sort(stable=True).indices
        return cls(batch, lengths, budgets, order[: sum(lengths)], order[sum(lengths) :])

    @classmethod
    def whole(cls, batch: SpanBatch, keeps: Sequence[int], reducer: str) -> Patches:
        """`of` for spans of which no patch is missing: t·h·w rows in raster order each.

        Raises
        ------
        PlanError
            An earlier stage has already dropped tokens of a span.
        """
        patches = cls.of(batch, keeps)
        for (t, h, w), length in zip(batch.grids, patches.lengths, strict=True):
            if length != t * h * w:
                raise PlanError(
                    f"reducer {reducer!r} compares places of a whole {t}×{h}×{w} grid, but "
                    f"{length} of its tokens are left. Use it at decoder entry (layer 0)."
                )
        return patches

    def of_patches(self, values: Tensor) -> Tensor:
        """The rows of `values` (n, …) that belong to patches."""
        return values if self.rows is None else values.index_select(0, self.rows)

    @property
    def features(self) -> Tensor:
        """Features of the patches, shape (patches, d)."""
        return self.of_patches(self.batch.features)

    @property
    def device(self) -> torch.device:
        return self.batch.features.device

    @property
    def starts(self) -> list[int]:
        """First patch of every span."""
        return list(itertools.accumulate(self.lengths[:-1], initial=0))

    def table(self, values: Any) -> Tensor:
        """Integers on the host as a tensor on the device, int64."""
        return torch.from_numpy(np.asarray(values, dtype=np.int64)).to(self.batch.features.device)

    def per_patch(self, values: Sequence[int]) -> Tensor:
        """One number per span as one per patch, int64, shape (patches,)."""
        return self.table(np.repeat(np.asarray(values, dtype=np.int64), self.lengths))

    def owners(self) -> Tensor:
        """The span of every patch, int64, shape (patches,)."""
        return self.per_patch(range(len(self.lengths)))

    def sizes(self) -> Tensor:
        """How many original tokens every patch stands for, float32, shape (patches,)."""
        if self.batch.sizes is None:
            return torch.ones(sum(self.lengths), device=self.device)
        return self.of_patches(self.batch.sizes)

    def host_cells(self) -> list[HostIndex]:
        """Raster index in the uncompressed grid of the patches of every span, on the host.

        Read from the device only where tokens are missing.
        """
        if self.batch.index is None:
            return [np.arange(length) for length in self.lengths]
        cells = self.cells().cpu().numpy()
        return np.split(cells, np.cumsum(self.lengths[:-1]))

    def per_frame(self) -> list[list[int]]:
        """Patches left of every frame of every span; read from the device if some are missing."""
        frames = [[h * w] * t for t, h, w in self.batch.grids]
        if self.batch.index is None:
            return frames
        first = list(itertools.accumulate(map(len, frames), initial=0))
        areas = self.per_patch([h * w for _, h, w in self.batch.grids])
        frame = self.cells() // areas + self.per_patch(first[:-1])
        counts = torch.bincount(frame, minlength=first[-1]).tolist()
        return [counts[a:b] for a, b in itertools.pairwise(first)]

    def cells(self) -> Tensor:
        """Raster index in the uncompressed grid of every patch, int64, shape (patches,)."""
        offsets = self.of_patches(self.batch.offsets)
        if self.batch.special is None:
            return offsets
        # Special tokens never leave, so those before a patch are counted on the live tokens.
        before = self.batch.special.cumsum(0)
        others = list(itertools.accumulate(self.batch.fixed[:-1], initial=0))
        return offsets - self.of_patches(before - self.batch.per_row(others))

    def numbers(self, rows: Tensor) -> Tensor:
        """The patches among the kept `rows` of the batch, as many as the budgets, int64."""
        if self.batch.special is None:
            return rows
        patch = ~self.batch.special
        own = rows_where(patch.index_select(0, rows), sum(self.budgets))
        return (patch.cumsum(0) - 1).index_select(0, rows.index_select(0, own))

    def kept(self, chosen: Tensor) -> Reduction:
        """The reduction that keeps all special tokens and the patches `chosen`, ascending."""
        if self.rows is None or self.special is None:
            return Reduction(chosen)
        rows = self.rows.index_select(0, chosen.to(self.device))
        return Reduction(torch.cat([self.special, rows]).sort().values)

    def replaced(self, chosen: Tensor, x: Tensor, sizes: Tensor) -> Reduction:
        """The reduction that keeps all special tokens and puts new patches at `chosen`.

        Parameters
        ----------
        chosen : Tensor of int64, shape (k,)
            Patches whose places the new ones take, in any order.
        x : Tensor, shape (k, d)
            Features of the new patches, in any dtype; they get that of the batch.
        sizes : Tensor of float32, shape (k,)
            How many original tokens each of them stands for.
        """
        x = x.to(self.batch.features.dtype)
        if self.rows is not None and self.special is not None:
            chosen = torch.cat([self.special, self.rows.index_select(0, chosen)])
            x = torch.cat([self.batch.features.index_select(0, self.special), x])
            sizes = torch.cat([sizes.new_ones(len(self.special)), sizes])
        keep, order = chosen.sort()
        return Reduction(keep, x.index_select(0, order), sizes.index_select(0, order))


def rows_where(mask: Tensor, count: int) -> Tensor:
    """The `count` rows at which mask (n,), bool or uint8, holds, ascending, int64.

    They are sorted out, because the host would have to wait for the length of `nonzero`.
    """
    return mask.to(torch.uint8).sort(descending=True, stable=True).indices[:count]


def evenly(n: int, k: int) -> HostIndex:
    """Places floor((i + ½)·n/k) of k of n things."""
    steps = np.arange(k)
    return (2 * steps + 1) * n // (2 * max(k, 1))
