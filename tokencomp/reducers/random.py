"""Baseline: a random subset (between layers: arXiv 2512.07580)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from tokencomp.reducers import Kept, Tokens, Traits, best_rows, register_reducer
from tokencomp.reducers._late import Baseline
from tokencomp.validation import between


@lru_cache(maxsize=8)
def random_ranks(seed: int, cells: int) -> Tensor:
    """A random number per cell, the same for any grid and device."""
    return torch.rand(cells, generator=torch.Generator().manual_seed(seed))


@register_reducer("random")
@dataclass(frozen=True)
class Random(Baseline):
    """Keep a random subset.

    It depends only on the seed and the raster index of a patch, so it is the same in any batch, on
    any device, and in transformers and vLLM.

    Attributes
    ----------
    seed : int
        0 … 2⁶³ - 1. Every span of the same grid gets the same subset. A smaller subset is part of
        every larger one.
    """

    seed: int = field(default=0, metadata=between(0, 2**63 - 1))

    traits = Traits(batched=True)
    summary = "a random subset (baseline)"

    def reduce(self, tokens: Tokens) -> Kept:
        most = max(map(math.prod, tokens.grids))
        ranks = random_ranks(self.seed, most).to(tokens.device)
        rank = ranks.index_select(0, tokens.cells())
        return Kept(best_rows(rank, tokens.budgets, tokens.lengths))
