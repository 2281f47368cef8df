"""VisionZip: dominant tokens, and means of the others (arXiv 2412.04467)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from tokencomp.reducers import Kept, Reducer, Tokens, Traits, best_rows, register_reducer
from tokencomp.reducers._batch import complement
from tokencomp.reducers.base import salient, tower_signal
from tokencomp.tokens.signals import TOWER_ATTENTION, TOWER_KEYS
from tokencomp.tokens.stacks import nearest, starts_of

CONTEXTUAL = 10 / 64


@register_reducer("visionzip")
@dataclass(frozen=True)
class VisionZip(Reducer):
    """Keep what the vision tower attends to most, and merge the other tokens by keys.

    VisionZip (arXiv 2412.04467), with budget K, attention a and keys k (mean over heads) of the
    tower:

        C        = max(1, round(10/64 · K))
        dominant = the K - C tokens of largest a_i
        targets  = of the m other tokens, in raster order, every ⌊m/C⌋-th
        x_t      ← mean of x_t and of the other tokens whose nearest target, by cos(k_i, k_t), is t

    This is the form of AngelSlim, which published comparisons use; it sums attention over a token's
    patches, whose mean here ranks alike. Deviations from the authors' code for LLaVA:

    - It adds the mean of the others to the target, which about doubles its norm; here it is
      averaged.
    - It merges before the projector and keeps the class token as one more row.
    - It puts contextual tokens after the others at new positions; here every token keeps its
      position.
    """

    summary = "dominant tokens by tower attention, means of the rest (VisionZip 2412.04467)"
    traits = Traits(merges=True, batched=True)
    needs = frozenset({TOWER_ATTENTION, TOWER_KEYS})

    def reduce(self, tokens: Tokens) -> Kept:
        from tokencomp.kernels import merge_rows

        x, attention = salient(tokens, "visionzip")
        keys = tower_signal(tokens, TOWER_KEYS, "visionzip").mean(1)
        contextual = [max(1, round(budget * CONTEXTUAL)) for budget in tokens.budgets]
        counts = [k - c for k, c in zip(tokens.budgets, contextual, strict=True)]
        dominant = best_rows(attention, counts, tokens.lengths)
        # Targets: every ⌊m/C⌋-th of the m other tokens of a span.
        rest = complement(dominant, len(x))
        m = [n - k for n, k in zip(tokens.lengths, counts, strict=True)]
        runs = zip(starts_of(m), m, contextual, strict=False)
        targets = [start + np.arange(c) * max(1, n // c) for start, n, c in runs]
        at = tokens.table(np.concatenate(targets))
        # The other tokens merge into the target with the most similar key.
        near = rest[nearest(m, keys[rest], at, contextual)]
        kept = torch.cat([dominant, rest[at]]).sort().values
        target = torch.arange(len(x), device=x.device).index_copy(0, rest, near)
        target = target.index_copy(0, kept, kept)
        how = {"frames": tokens.lengths, "weighted": False}
        merged = merge_rows(x, target, kept, tokens.all_weights(), **how)
        return Kept.ascending(kept, merged.x, merged.sizes)
