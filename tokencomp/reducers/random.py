"""Baseline: a random subset."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from tokencomp.plan.reducer import Traits
from tokencomp.reducers._batch import best_rows
from tokencomp.reducers._late import Baseline
from tokencomp.reducers.registry import register_reducer
from tokencomp.tokens.kept import Kept
from tokencomp.tokens.tokens import Tokens
from tokencomp.validation import check_range


@lru_cache(maxsize=8)
def random_ranks(seed: int, cells: int) -> Tensor:
    """A random number for each of so many cells, the same for a cell of any grid and device."""
    return torch.rand(cells, generator=torch.Generator().manual_seed(seed))


@register_reducer("random")
@dataclass(frozen=True)
class Random(Baseline):
    """Keep a random subset.

    The choice depends only on the seed and the patch indices, so it is identical across batches,
    devices, and the Hugging Face and vLLM backends.

    Attributes
    ----------
    seed : int
        0 … 2⁶³ - 1. Every span of the same grid gets the same subset, whatever special tokens
        stand between its patches. A smaller subset is part of every larger one.
    """

    seed: int = 0

    traits = Traits(batched=True)
    summary = "a random subset (baseline)"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("random", "seed", self.seed, 0, 2**63 - 1)

    def reduce(self, tokens: Tokens) -> Kept:
        most = max(map(math.prod, tokens.grids))
        ranks = random_ranks(self.seed, most).to(tokens.device)
        rank = ranks.index_select(0, tokens.cells())
        return Kept(best_rows(rank, tokens.budgets, tokens.lengths))
