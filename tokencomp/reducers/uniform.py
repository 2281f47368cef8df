"""Baseline: evenly spaced tokens in raster order."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tokencomp.reducers import Kept, Tokens, Traits, register_reducer
from tokencomp.reducers._late import Baseline
from tokencomp.tokens.tokens import evenly


@register_reducer("uniform")
@dataclass(frozen=True)
class Uniform(Baseline):
    """Keep evenly spaced tokens: ⌊(i + ½) · n/k⌋ of the n patches, i = 0 … k - 1. Ours."""

    traits = Traits(batched=True)
    summary = "evenly spaced tokens in raster order (baseline)"

    def reduce(self, tokens: Tokens) -> Kept:
        spans = zip(tokens.starts, tokens.lengths, tokens.budgets, strict=True)
        places = [evenly(n, k) + start for start, n, k in spans]
        return Kept(tokens.table(np.concatenate(places)))
