"""Baseline: a random subset."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tokencomp.errors import OptionError
from tokencomp.reducers._batch import random_ranks
from tokencomp.reducers._late import Baseline
from tokencomp.reducers.registry import register_reducer
from tokencomp.tokens.patches import Patches
from tokencomp.tokens.reduction import Reduction
from tokencomp.tokens.spans import SpanBatch


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

    summary = "a random subset (baseline)"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.seed < 2**63:
            raise OptionError(f"random: seed={self.seed!r}; allowed: an integer from 0 to 2**63-1.")

    def reduce_batch(self, batch: SpanBatch, keeps: Sequence[int]) -> Reduction:
        from tokencomp.kernels import topk_stable

        patches = Patches.of(batch, keeps)
        ranks = random_ranks(self.seed, max(map(math.prod, batch.grids))).to(patches.device)
        rank = ranks.index_select(0, patches.cells())
        return patches.kept(topk_stable(rank, patches.budgets, spans=patches.lengths))
