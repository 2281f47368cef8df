"""Baseline: every m-th token in raster order."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tokencomp.plan.reducer import Traits
from tokencomp.reducers._late import Baseline
from tokencomp.reducers.registry import register_reducer
from tokencomp.tokens.kept import Kept
from tokencomp.tokens.tokens import Tokens, evenly


@register_reducer("uniform")
@dataclass(frozen=True)
class Uniform(Baseline):
    """Keep evenly spaced tokens: token floor((i + ½)·n/k) of the n patches, i = 0 … k-1. Ours."""

    traits = Traits(batched=True)
    summary = "evenly spaced tokens in raster order (baseline)"

    def reduce(self, tokens: Tokens) -> Kept:
        spans = zip(tokens.starts, tokens.lengths, tokens.budgets, strict=True)
        places = [evenly(n, k) + start for start, n, k in spans]
        return Kept(tokens.table(np.concatenate(places)))
