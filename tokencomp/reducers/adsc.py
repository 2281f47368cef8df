"""ADSC: uniform downsampling between layers, without any score."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass

import numpy as np

from tokencomp.plan.counts import check_ratio, split_evenly
from tokencomp.plan.plan import Plan, from_profile
from tokencomp.plan.reducer import Traits
from tokencomp.plan.schedules import solved
from tokencomp.reducers.published import Published
from tokencomp.reducers.registry import register_reducer
from tokencomp.tokens.kept import Kept
from tokencomp.tokens.stacks import HostIndex
from tokencomp.tokens.tokens import Tokens

STAGES = (1 / 8, 1 / 3, 1 / 2)  # of the depth
WINDOW = 2.0  # tokens of which each stage leaves one


@register_reducer("adsc")
@dataclass(frozen=True)
class Adsc(Published):
    """Keep one token of every window of visual tokens, at several depths of the decoder.

    Attention-driven self-compression (arXiv 2602.12618) drops tokens by their place alone; the
    bottleneck makes the model move information into the tokens that stay. The published method
    fine-tunes the model while the reducer acts. This is its *training-free* form (ours);
    `tokencomp train adsc` trains a LoRA adapter for it.

    Notes
    -----
    Windows are runs of live tokens of one frame. The last token of a window stays: under a causal
    mask it is the only one that has seen all of it. Layers and windows of the paper are not public;
    windows of 2 after layers 4, 11 and 16 of 32 give about its mean of 192 of 576 tokens (193.5).
    Other ratios widen or narrow all windows, or add one before the first layer, so that the mean
    over layers meets the ratio.
    """

    traits = Traits(batched=True)
    summary = "uniform downsampling between layers; training-free form of ADSC (2602.12618)"

    def plan(self, ratio: float, num_layers: int) -> Plan:
        family = functools.partial(profile, num_layers)
        return from_profile(solved(family, 1.0 - check_ratio(ratio), 1.0 / WINDOW, 1.0), self)

    def published_layers(self, num_layers: int) -> tuple[int, ...]:
        natural = profile(num_layers)
        return tuple(stage.layer for stage in from_profile(natural, self).stages)

    def reduce(self, tokens: Tokens) -> Kept:
        """Places alone decide, so that all is computed on the host."""
        chosen, grids = [], tokens.grids
        spans = zip(tokens.starts, tokens.host_cells(), grids, tokens.budgets, strict=True)
        for first, cells, grid, budget in spans:
            area = grid[1] * grid[2]
            counts = np.bincount(cells // area, minlength=grid[0]).tolist()
            starts = itertools.accumulate(counts, initial=0)
            quotas = split_evenly(budget, counts)
            for start, count, quota in zip(starts, counts, quotas, strict=False):
                chosen.append(window_ends(count, quota) + start + first)
        return Kept(tokens.table(np.concatenate(chosen)))


def profile(num_layers: int, factor: float = 1.0 / WINDOW) -> list[float]:
    """Fraction seen by every layer if each stage leaves `factor` of what reaches it."""
    starts = [round(s * num_layers) for s in STAGES]
    return [factor ** sum(s <= layer for s in starts) for layer in range(num_layers)]


def window_ends(count: int, quota: int) -> HostIndex:
    """The last row of each of `quota` windows that cut `count` rows as evenly as possible."""
    return np.arange(1, quota + 1) * count // max(quota, 1) - 1
