"""Baseline: a random subset."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from tokencomp.errors import OptionError
from tokencomp.reducers._rows import keep_patches, patch_rows
from tokencomp.reducers.base import Reducer
from tokencomp.reducers.registry import register_reducer
from tokencomp.tokens import Reduction, VisualTokens


@register_reducer("random")
@dataclass(frozen=True)
class Random(Reducer):
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

    def reduce(self, tokens: VisualTokens, keep: int) -> Reduction:
        from tokencomp.kernels import topk_stable

        patches, budget = patch_rows(tokens, keep)
        generator = torch.Generator().manual_seed(self.seed)
        rank = torch.rand(math.prod(tokens.grid), generator=generator).to(tokens.features.device)
        return keep_patches(tokens, patches[topk_stable(rank[tokens.cells()], budget)])
