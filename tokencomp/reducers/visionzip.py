"""Comparator: dominant tokens, and means of the rest."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from tokencomp.plan.reducer import Traits
from tokencomp.reducers._batch import best_rows, salient, tower_signal
from tokencomp.reducers.base import Reducer
from tokencomp.reducers.registry import register_reducer
from tokencomp.tokens.kept import Kept
from tokencomp.tokens.signals import TOWER_ATTENTION, TOWER_KEYS
from tokencomp.tokens.stacks import starts_of
from tokencomp.tokens.tokens import Tokens, nearest, rows_where

CONTEXTUAL = 10 / 64


@register_reducer("visionzip")
@dataclass(frozen=True)
class VisionZip(Reducer):
    """Keep what the vision tower attends to most, and merge the rest by its keys.

    VisionZip (arXiv 2412.04467). Of K tokens, C = max(1, round(10/64 · K)) are contextual and the
    others dominant: those with the largest attention in the tower. Of the rest, in raster order,
    every ⌊m / C⌋-th of m is a target; the others go to the target with the most similar key (cosine
    of the mean over heads), and a target becomes the mean of itself and what went to it.

    Notes
    -----
    This is the form of AngelSlim, which published comparisons use. The authors' code for LLaVA adds
    the mean of the others to the target instead of averaging (about twice the length), merges
    before the projector, keeps the class token as one more row, and puts contextual tokens behind
    the others at new positions. Here every token keeps its place. AngelSlim sums the attention that
    a patch receives over a token's patches; their mean ranks alike.
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
        free = torch.ones(len(x), dtype=torch.bool, device=x.device)
        rest = rows_where(free.index_fill_(0, dominant, False), len(x) - len(dominant))
        left = [n - k for n, k in zip(tokens.lengths, counts, strict=True)]
        runs = zip(starts_of(left), left, contextual, strict=False)
        places = [start + np.arange(c) * max(1, n // c) for start, n, c in runs]
        at = tokens.table(np.concatenate(places))
        near = rest[nearest(left, keys[rest], at, contextual)]
        kept = torch.cat([dominant, rest[at]]).sort().values
        target = torch.arange(len(x), device=x.device).index_copy(0, rest, near)
        target = target.index_copy(0, kept, kept)
        how = {"frames": tokens.lengths, "weighted": False}
        merged = merge_rows(x, target, kept, tokens.all_weights(), **how)
        return Kept.ascending(kept, merged.x, merged.sizes)
