"""ADSC: uniform downsampling between layers, without any score."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tokencomp.errors import OptionError
from tokencomp.plan.counts import check_ratio, split_evenly
from tokencomp.plan.plan import Plan, from_profile
from tokencomp.plan.schedules import bisect, early
from tokencomp.reducers.published import Published
from tokencomp.reducers.registry import register_reducer
from tokencomp.tokens.patches import Patches
from tokencomp.tokens.reduction import Reduction
from tokencomp.tokens.spans import SpanBatch
from tokencomp.tokens.stacks import HostIndex

MOST = 1 << 20  # tokens; more than any frame has


@register_reducer("adsc")
@dataclass(frozen=True)
class Adsc(Published):
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

    Notes
    -----
    Windows are runs of live tokens of one frame. The last token of a window stays: under a causal
    mask it is the only one that has seen all of it.
    """

    stages: tuple[float, ...] = (1 / 8, 1 / 3, 1 / 2)
    window: float = 2.0

    summary = "uniform downsampling between layers; training-free form of ADSC (2602.12618)"

    def __post_init__(self) -> None:
        super().__post_init__()
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
                chosen.append(window_ends(count, quota) + start + first)
        return patches.kept(patches.table(np.concatenate(chosen)))


def window_ends(count: int, quota: int) -> HostIndex:
    """The last row of each of `quota` windows that cut `count` rows as evenly as possible."""
    ends: HostIndex = np.arange(1, quota + 1) * count // max(quota, 1) - 1
    return ends
