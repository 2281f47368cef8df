"""ADSC: uniform downsampling between layers, without any score."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from tokencomp.errors import OptionError
from tokencomp.plan import Plan, check_ratio, from_profile
from tokencomp.reducers._options import check_range
from tokencomp.reducers._rows import frame_counts, joined, share, split
from tokencomp.reducers.base import Reducer, check_choice, register_reducer
from tokencomp.schedules import bisect, early
from tokencomp.tokens import Grid, Reduction, VisualTokens

MOST = 1 << 20  # tokens; more than any frame has


@register_reducer("adsc")
@dataclass(frozen=True)
class Adsc(Reducer):
    """Keep one token of every window of visual tokens, again and again on the way up.

    Attention-driven self-compression (arXiv 2602.12618) drops tokens by place alone; the
    bottleneck makes the model itself move information into the survivors. The published method
    fine-tunes the model with the reducer in force. This is its *training-free* form (ours);
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
    lattice: str = "raster"
    offset: int = -1

    summary = "uniform downsampling between layers; training-free form of ADSC (2602.12618)"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("adsc", "lattice", self.lattice, ("raster", "grid"))
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

    def _profile(self, num_layers: int, factor: float) -> list[float]:
        """Fraction seen by every layer when each stage leaves `factor` of what it finds."""
        starts = [round(s * num_layers) for s in self.stages]
        return [factor ** sum(s <= layer for s in starts) for layer in range(num_layers)]

    def reduce(self, tokens: VisualTokens, keep: int) -> Reduction:
        patches, special = split(tokens)
        per_frame = tokens.grid[1] * tokens.grid[2]
        cells, counts = tokens.cells(), frame_counts(tokens)
        starts = itertools.accumulate(counts, initial=0)
        chosen = []
        quotas = share(keep - special.numel(), counts)
        for start, count, quota in zip(starts, counts, quotas, strict=False):
            frame = patches[start : start + count]
            if self.lattice == "grid":
                here = cells[start : start + count] % per_frame
                rows = lattice(here, tokens.grid, quota, self.offset)
            else:
                rows = windows(count, quota, self.offset, cells.device)
            chosen.append(frame[rows])
        return joined(tokens, torch.cat(chosen))


def windows(count: int, quota: int, offset: int, device: torch.device) -> Tensor:
    """One row of each of `quota` windows that cut `count` rows as evenly as possible."""
    ends = torch.arange(quota + 1, device=device) * count // max(quota, 1)
    first, size = ends[:-1], ends.diff()
    place = size + offset if offset < 0 else torch.full_like(size, offset)
    return first + torch.minimum(place.clamp(min=0), size - 1)


def lattice(cells: Tensor, grid: Grid, quota: int, offset: int) -> Tensor:
    """`quota` of the live cells of one frame on a lattice, as row numbers.

    Width and height are halved in turn; a cell's level says how many halvings it outlives. The
    highest levels stay whole, and the level that does not fit any more is thinned evenly.
    """
    _, height, width = grid
    down = cells // width - (offset if offset >= 0 else height + offset)
    right = cells % width - (offset if offset >= 0 else width + offset)
    level = torch.zeros_like(cells)
    alive = torch.ones_like(cells, dtype=torch.bool)
    for halving in range(max(height, width).bit_length()):
        for distance in (right, down):
            alive = alive & (distance % 2 ** (halving + 1) == 0)
            level += alive
    chosen = []
    for value in range(int(level.max()) if level.numel() else -1, -1, -1):
        rows = (level == value).nonzero()[:, 0]
        take = min(quota, rows.numel())
        chosen.append(rows[windows(rows.numel(), take, offset, cells.device)])
        quota -= take
    return torch.cat(chosen) if chosen else cells
