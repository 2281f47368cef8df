"""ADSC: uniform downsampling between layers, without any score."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from tokencomp.errors import OptionError
from tokencomp.plan.counts import check_ratio, split_evenly
from tokencomp.plan.plan import Plan, from_profile
from tokencomp.plan.schedules import bisect, early
from tokencomp.reducers._batch import Patches, Places
from tokencomp.reducers.base import Reducer
from tokencomp.reducers.registry import register_reducer
from tokencomp.tokens.reduction import Reduction
from tokencomp.tokens.spans import Grid, SpanBatch
from tokencomp.validation import check_range

MOST = 1 << 20  # tokens; more than any frame has


@register_reducer("adsc")
@dataclass(frozen=True)
class Adsc(Reducer):
    """Keep one token of every window of visual tokens, at several depths of the decoder.

    Attention-driven self-compression (arXiv 2602.12618) drops tokens by their place alone; the
    bottleneck makes the model move information into the tokens that stay. The published method
    fine-tunes the model while the reducer acts. This is its *training-free* form (ours);
    `tokencomp train adsc` trains a LoRA adapter for it.

    Attributes
    ----------
    stages : tuple of float
        Where tokens leave, as fractions of the depth. Layers and windows of the paper are not
        public; a window of 2 after layers 4, 11 and 16 of 32 gives about its mean of 192 of 576
        tokens (193.5).
    window : float
        Window of each stage at the natural ratio. Other ratios widen or narrow all windows, or
        add one before the first layer, so that the mean over layers meets the ratio.
    lattice : str
        "raster": windows of consecutive live tokens inside each frame. "grid": a two-dimensional
        lattice per frame, halved along width and height in turn.
    offset : int
        Which token of its window stays; -1 is the last, the only one that has seen the whole
        window under a causal mask. Clamped to the window.
    """

    stages: tuple[float, ...] = (1 / 8, 1 / 3, 1 / 2)
    window: float = 2.0
    lattice: Literal["raster", "grid"] = "raster"
    offset: int = -1

    summary = "uniform downsampling between layers; training-free form of ADSC (2602.12618)"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("adsc", "offset", self.offset, -MOST, MOST)
        object.__setattr__(self, "stages", tuple(float(s) for s in self.stages))
        if not self.stages or list(self.stages) != sorted(self.stages):
            raise OptionError(f"adsc: stages={self.stages}; expected ascending fractions of depth.")
        if not (self.stages[0] >= 0 and self.stages[-1] < 1):
            raise OptionError(f"adsc: stages={self.stages}; every fraction must lie in [0, 1).")
        if not 1 < self.window <= MOST:
            raise OptionError(f"adsc: window={self.window}; allowed: above 1, at most {MOST}.")

    def plan(self, ratio: float, num_layers: int) -> Plan:
        target = 1.0 - check_ratio(ratio)
        if target == 1.0:
            return Plan()
        natural = self._profile(num_layers, 1.0 / self.window)
        if target <= sum(natural) / num_layers:
            return from_profile(early(natural, target), self)
        factor = bisect(lambda f: self._profile(num_layers, f), target, 1.0 / self.window, 1.0)
        return from_profile(self._profile(num_layers, factor), self)

    def published_layers(self, num_layers: int) -> tuple[int, ...]:
        natural = self._profile(num_layers, 1.0 / self.window)
        return tuple(stage.layer for stage in from_profile(natural, self).stages)

    def _profile(self, num_layers: int, factor: float) -> list[float]:
        """Fraction seen by every layer if each stage leaves `factor` of what reaches it."""
        starts = [round(s * num_layers) for s in self.stages]
        return [factor ** sum(s <= layer for s in starts) for layer in range(num_layers)]

    @property
    def needs_grid(self) -> bool:
        return self.lattice == "grid"

    def reduce_batch(self, batch: SpanBatch, keeps: Sequence[int]) -> Reduction:
        """Places alone decide, so that all is computed on the host."""
        patches, chosen = Patches.of(batch, keeps), []
        spans = zip(patches.starts, patches.host_cells(), batch.grids, patches.budgets, strict=True)
        for first, cells, grid, budget in spans:
            area = grid[1] * grid[2]
            counts = np.bincount(cells // area, minlength=grid[0]).tolist()
            starts = itertools.accumulate(counts, initial=0)
            quotas = split_evenly(budget, counts)
            for start, count, quota in zip(starts, counts, quotas, strict=False):
                if self.lattice == "grid":
                    rows = lattice(cells[start : start + count] % area, grid, quota, self.offset)
                else:
                    rows = windows(count, quota, self.offset)
                chosen.append(np.sort(rows) + start + first)
        return patches.kept(patches.table(np.concatenate(chosen)))


def windows(count: int, quota: int, offset: int) -> Places:
    """One row of each of `quota` windows that cut `count` rows as evenly as possible."""
    ends = np.arange(quota + 1) * count // max(quota, 1)
    first, size = ends[:-1], np.diff(ends)
    place = np.maximum(size + offset if offset < 0 else np.full_like(size, offset), 0)
    rows: Places = first + np.minimum(place, size - 1)
    return rows


def lattice(cells: Places, grid: Grid, quota: int, offset: int) -> Places:
    """`quota` of the live cells of one frame on a lattice, as row numbers.

    Width and height are halved in turn; a cell's level is the number of halvings after which it
    is still on the lattice. The highest levels stay whole, and the first level that exceeds the
    rest of the quota is thinned evenly.
    """
    _, height, width = grid
    down = cells // width - (offset if offset >= 0 else height + offset)
    right = cells % width - (offset if offset >= 0 else width + offset)
    level, alive = np.zeros_like(cells), np.ones_like(cells, dtype=np.bool_)
    for halving in range(max(height, width).bit_length()):
        for distance in (right, down):
            alive = alive & (distance % 2 ** (halving + 1) == 0)
            level += alive
    chosen = []
    for value in range(int(level.max()) if len(level) else -1, -1, -1):
        rows = np.flatnonzero(level == value)
        take = min(quota, len(rows))
        chosen.append(rows[windows(len(rows), take, offset)])
        quota -= take
    return np.concatenate(chosen) if chosen else cells
