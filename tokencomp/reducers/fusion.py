"""Comparator: fusion of neighbours in time, for audio."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from tokencomp.plan.reducer import Traits
from tokencomp.reducers._batch import best_rows, finite_features
from tokencomp.reducers.base import Reducer
from tokencomp.reducers.registry import register_reducer
from tokencomp.tokens.kept import Kept
from tokencomp.tokens.tokens import Tokens


@register_reducer("fusion")
@dataclass(frozen=True)
class Fusion(Reducer):
    """Fuse the neighbours in time that resemble each other most, until the budget is met.

    The iterative fusion of FastLongSpeech (arXiv 2507.14815). Each round compares every token with
    the next one (cosine) and joins the most similar pairs; pairs that touch form a run. A round
    leaves half of the tokens, the last one the budget. A run becomes its mean, weighted by how many
    tokens each row stands for, at the position of its first token.

    Notes
    -----
    Made for audio, whose tokens stand in one line; in a picture the next token is that in raster
    order. The release weights by 1 - P(blank) of a CTC head that it trains, and fuses the tower's
    output before norm and projector; weights by number and projected tokens (both ours) need no
    training, and run in servers. On questions about sounds (benchmarks/sounds) it is below random
    dropping: a long sound becomes as short as any other.
    """

    summary = "fuses similar neighbours in time, for audio (FastLongSpeech 2507.14815)"
    traits = Traits(merges=True, batched=True)

    def reduce(self, tokens: Tokens) -> Kept:
        x, sizes = finite_features(tokens.features), tokens.all_weights()
        places, lengths = torch.arange(len(x), device=x.device), tokens.lengths
        while lengths != tokens.budgets:
            pairs = zip(lengths, tokens.budgets, strict=True)
            after = [max(budget, length // 2) for length, budget in pairs]
            x, sizes, places = fuse(x, sizes, places, lengths, after)
            lengths = after
        return Kept.ascending(places, x, sizes)


def fuse(
    x: Tensor, sizes: Tensor, places: Tensor, lengths: Sequence[int], after: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """One round: rows x (n, d), sizes and places of spans that shrink to the lengths `after`."""
    from tokencomp.kernels import merge_rows

    wide = x.float()
    alike = cosine_similarity(wide, wide.roll(-1, 0), dim=1)
    ends = torch.from_numpy(np.cumsum(lengths) - 1).to(x.device)  # have no next row in their span
    alike = alike.index_fill(0, ends, -torch.inf)
    gone = [length - left for length, left in zip(lengths, after, strict=True)]
    joined = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    joined.index_fill_(0, best_rows(alike, gone, lengths) + 1, 1)
    # Sorting instead of `nonzero`, whose length the host would have to read.
    first = joined.sort(stable=True).indices[: sum(after)]
    target = first.index_select(0, (1 - joined).cumsum(0) - 1)
    merged = merge_rows(x, target, first, sizes, frames=lengths)
    return merged.x, merged.sizes, places.index_select(0, first)
