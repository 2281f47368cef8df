"""Baseline: every m-th token in raster order."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tokencomp.reducers._rows import keep_patches, patch_rows
from tokencomp.reducers.base import Reducer
from tokencomp.reducers.registry import register_reducer
from tokencomp.tokens import Reduction, VisualTokens


@register_reducer("uniform")
@dataclass(frozen=True)
class Uniform(Reducer):
    """Keep evenly spaced tokens: token floor((i + ½)·n/k) of the n patches, i = 0 … k-1. Ours."""

    summary = "evenly spaced tokens in raster order (baseline)"

    def reduce(self, tokens: VisualTokens, keep: int) -> Reduction:
        patches, k = patch_rows(tokens, keep)
        n = patches.numel()
        steps = torch.arange(k, device=patches.device)
        return keep_patches(tokens, patches[(2 * steps + 1) * n // (2 * max(k, 1))])
