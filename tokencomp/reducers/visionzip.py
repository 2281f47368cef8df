"""Comparator: dominant tokens, and means of the rest."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import normalize

from tokencomp.reducers._rows import replace_patches, salient_rows, tower_signal
from tokencomp.reducers.base import Reducer
from tokencomp.reducers.registry import register_reducer
from tokencomp.tokens.reduction import Reduction
from tokencomp.tokens.signals import TOWER_ATTENTION, TOWER_KEYS
from tokencomp.tokens.spans import VisualTokens

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
    merges = True
    needs = frozenset({TOWER_ATTENTION, TOWER_KEYS})

    def reduce(self, tokens: VisualTokens, keep: int) -> Reduction:
        from tokencomp.kernels import merge_rows, topk_stable

        rows, budget, x, attention = salient_rows(tokens, keep, "visionzip")
        keys = tower_signal(tokens, TOWER_KEYS, "visionzip")[rows].mean(1)
        contextual = max(1, round(budget * CONTEXTUAL))
        dominant = topk_stable(attention, budget - contextual)
        free = torch.ones(len(rows), dtype=torch.bool, device=x.device)
        free[dominant] = False
        rest = free.nonzero()[:, 0]
        step = max(1, len(rest) // contextual)
        targets = rest[::step][:contextual]
        unit = normalize(keys.float(), dim=1)
        target = torch.arange(len(rows), device=x.device)
        target[rest] = targets[(unit[rest] @ unit[targets].T).argmax(1)]
        target[targets] = targets
        kept = torch.cat([dominant, targets]).sort().values
        sizes = None if tokens.sizes is None else tokens.sizes[rows]
        merged = merge_rows(x, target, kept, sizes, weighted=False)
        return replace_patches(tokens, rows[kept], merged.x, merged.sizes)
