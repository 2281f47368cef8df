"""Baseline: every m-th token in raster order."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tokencomp.reducers._rows import joined, split
from tokencomp.reducers.base import Reducer, register_reducer
from tokencomp.tokens import Reduction, VisualTokens


@register_reducer("uniform")
@dataclass(frozen=True)
class Uniform(Reducer):
    """Keep evenly spaced tokens: token floor((i + ½)·n/k) of the n patches, i = 0 … k-1. Ours."""

    summary = "evenly spaced tokens in raster order (baseline)"
    serving_safe = True

    def reduce(self, tokens: VisualTokens, keep: int) -> Reduction:
        patches, special = split(tokens)
        k = keep - special.numel()
        n = patches.numel()
        steps = torch.arange(k, device=patches.device)
        return joined(tokens, patches[(2 * steps + 1) * n // (2 * max(k, 1))])
