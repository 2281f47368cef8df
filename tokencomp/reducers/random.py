"""Baseline: a random subset."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from tokencomp.errors import OptionError
from tokencomp.reducers._rows import joined, split
from tokencomp.reducers.base import Reducer, register_reducer
from tokencomp.tokens import Reduction, VisualTokens


@register_reducer("random")
@dataclass(frozen=True)
class Random(Reducer):
    """Keep a random subset. Seed and patch numbers decide alone: batches, devices and homes agree.

    Attributes
    ----------
    seed : int
        0 … 2⁶³ - 1. Every span of the same grid gets the same subset, whatever special tokens
        stand between its patches; subsets at smaller budgets are nested.
    """

    seed: int = 0

    summary = "a random subset (baseline)"
    serving_safe = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.seed < 2**63:
            raise OptionError(f"random: seed={self.seed!r}; allowed: an integer from 0 to 2**63-1.")

    def reduce(self, tokens: VisualTokens, keep: int) -> Reduction:
        from tokencomp.kernels import topk_stable

        patches, special = split(tokens)
        generator = torch.Generator().manual_seed(self.seed)
        rank = torch.rand(math.prod(tokens.grid), generator=generator).to(tokens.features.device)
        return joined(tokens, patches[topk_stable(rank[tokens.cells()], keep - special.numel())])
