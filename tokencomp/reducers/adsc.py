"""ADSC: uniform downsampling between decoder layers (arXiv 2602.12618)."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass

import numpy as np

from tokencomp.plan.counts import check_ratio, split_evenly
from tokencomp.plan.plan import Plan, from_profile
from tokencomp.plan.schedules import solved
from tokencomp.reducers import Kept, Published, Tokens, Traits, register_reducer
from tokencomp.reducers.published import cut_layers
from tokencomp.tokens.stacks import HostIndex

STAGES = (1 / 8, 1 / 3, 1 / 2)  # fractions of the depth
WINDOW = 2.0  # tokens per window, which keeps one


@register_reducer("adsc")
@dataclass(frozen=True)
class Adsc(Published):
    """Keep the last token of every window of visual tokens, at several depths of the decoder.

    Attention-driven self-compression (ADSC, arXiv 2602.12618) needs no score: the bottleneck makes
    the model move information into the kept tokens. Of the n tokens of a frame with budget q these
    are kept, counted from 0:

        ⌊i·n/q⌋ - 1,  i = 1 … q

    Under a causal mask the last token of a window is the only one that has attended to all of it.

    Deviations from the paper:

    - It fine-tunes the model with this reducer. Here it also runs without training (ours);
      `tokencomp train adsc` trains a LoRA adapter.
    - Its layers and windows are not public. Windows of 2 after layers 4, 11 and 16 of 32 come close
      to its mean of 192 of 576 tokens (193.5).
    - For other ratios all windows get wider or narrower, or one more stage acts before the first
      layer.
    """

    traits = Traits(batched=True)
    summary = "uniform downsampling between layers; training-free form of ADSC (2602.12618)"

    def plan(self, ratio: float, num_layers: int) -> Plan:
        family = functools.partial(profile, num_layers)
        return from_profile(solved(family, 1.0 - check_ratio(ratio), 1.0 / WINDOW, 1.0), self)

    def published_layers(self, num_layers: int) -> tuple[int, ...]:
        return cut_layers(profile(num_layers), self)

    def reduce(self, tokens: Tokens) -> Kept:
        # Only indices matter, so everything is computed on the host.
        counts = tokens.per_frame()
        quotas = [split_evenly(k, n) for k, n in zip(tokens.budgets, counts, strict=True)]
        frames = [*itertools.chain(*counts)]
        starts = itertools.accumulate(frames, initial=0)
        windows = zip(starts, frames, itertools.chain(*quotas), strict=False)
        return Kept(tokens.table(np.concatenate([s + window_ends(n, k) for s, n, k in windows])))


def profile(num_layers: int, factor: float = 1.0 / WINDOW) -> list[float]:
    """Fraction of tokens that every layer sees if each stage keeps the fraction `factor`."""
    starts = [round(s * num_layers) for s in STAGES]
    return [factor ** sum(s <= layer for s in starts) for layer in range(num_layers)]


def window_ends(count: int, quota: int) -> HostIndex:
    """The last row of each of `quota` windows that divide `count` rows as evenly as possible."""
    return np.arange(1, quota + 1) * count // max(quota, 1) - 1
