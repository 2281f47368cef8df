"""Baseline: a random subset."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tokencomp.context import Reduction, VisualTokens
from tokencomp.reducers.base import Reducer, register_reducer, top_k


@register_reducer("random")
@dataclass(frozen=True)
class Random(Reducer):
    """Keep a random subset. Seed and token offsets decide alone: batches, devices and homes agree.

    Attributes
    ----------
    seed : int
        Every span of the same length gets the same subset; subsets at smaller budgets are nested.
    """

    seed: int = 0

    summary = "a random subset (baseline)"
    serving_safe = True

    def reduce(self, tokens: VisualTokens, keep: int) -> Reduction:
        total = tokens.grid[0] * tokens.grid[1] * tokens.grid[2] + int(tokens.special.sum())
        generator = torch.Generator().manual_seed(self.seed)
        rank = torch.rand(total, generator=generator).to(tokens.features.device)
        return Reduction(top_k(rank[tokens.offsets], tokens.special, keep))
