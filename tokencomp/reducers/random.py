"""Baseline: a random subset."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from tokencomp.context import Reduction, VisualTokens
from tokencomp.reducers.base import Reducer, register_reducer, top_k


@register_reducer("random")
@dataclass(frozen=True)
class Random(Reducer):
    """Keep a random subset. Seed and patch numbers decide alone: batches, devices and homes agree.

    Attributes
    ----------
    seed : int
        Every span of the same grid gets the same subset, whatever special tokens stand between
        its patches; subsets at smaller budgets are nested.
    """

    seed: int = 0

    summary = "a random subset (baseline)"
    serving_safe = True

    def reduce(self, tokens: VisualTokens, keep: int) -> Reduction:
        generator = torch.Generator().manual_seed(self.seed)
        rank = torch.rand(math.prod(tokens.grid), generator=generator).to(tokens.features.device)
        offsets = tokens.offsets
        patch = offsets - torch.searchsorted(offsets[tokens.special], offsets)
        scores = rank[patch.clamp(max=rank.numel() - 1)]  # of special tokens: not looked at
        return Reduction(top_k(scores, tokens.special, keep))
