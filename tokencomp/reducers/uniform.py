"""Baseline: every m-th token in raster order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from tokencomp.reducers._late import Baseline
from tokencomp.reducers.registry import register_reducer
from tokencomp.tokens.patches import Patches, evenly
from tokencomp.tokens.reduction import Reduction
from tokencomp.tokens.spans import SpanBatch


@register_reducer("uniform")
@dataclass(frozen=True)
class Uniform(Baseline):
    """Keep evenly spaced tokens: token floor((i + ½)·n/k) of the n patches, i = 0 … k-1. Ours."""

    summary = "evenly spaced tokens in raster order (baseline)"

    def reduce_batch(self, batch: SpanBatch, keeps: Sequence[int]) -> Reduction:
        patches = Patches.of(batch, keeps)
        return patches.kept(self.chosen(patches))

    def chosen(self, patches: Patches) -> Tensor:
        """Patches that stay, ascending."""
        spans = zip(patches.starts, patches.lengths, patches.budgets, strict=True)
        places = [evenly(n, k) + start for start, n, k in spans]
        return patches.table(np.concatenate(places))
