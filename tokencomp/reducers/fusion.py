"""Iterative fusion of neighbours in time, for audio (FastLongSpeech, arXiv 2507.14815)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from tokencomp.reducers import Kept, Reducer, Tokens, Traits, register_reducer
from tokencomp.reducers.base import best_rows, finite_features
from tokencomp.tokens.tokens import rows_where


@register_reducer("fusion")
@dataclass(frozen=True)
class Fusion(Reducer):
    """Merge neighbours in time that are most similar, until the budget is met.

    The iterative fusion of FastLongSpeech (arXiv 2507.14815). One round on n tokens, with budget K:

        merge the n - max(K, ⌊n/2⌋) pairs (x_i, x_{i+1}) of largest cosine

    Pairs that share a token form a run, which becomes its weighted mean at its first position.

    Deviations from the release:

    - Means are weighted by the number of tokens; it weights by 1 - P(blank) of a CTC head that it
      trains.
    - Projected tokens are compared; it compares the tower's output before norm and projector.
    - On images the next token is the next one in raster order.

    On questions about sounds (benchmarks/sounds) it is below random dropping, because a long sound
    becomes as short as any other.
    """

    summary = "fuses similar neighbours in time, for audio (FastLongSpeech 2507.14815)"
    traits = Traits(merges=True, batched=True)

    def reduce(self, tokens: Tokens) -> Kept:
        x, sizes = finite_features(tokens.features), tokens.all_weights()
        rows, lengths = torch.arange(len(x), device=x.device), tokens.lengths
        while lengths != tokens.budgets:
            pairs = zip(lengths, tokens.budgets, strict=True)
            after = [max(budget, length // 2) for length, budget in pairs]
            x, sizes, rows = fuse(x, sizes, rows, lengths, after)
            lengths = after
        return Kept.ascending(rows, x, sizes)


def fuse(
    x: Tensor, sizes: Tensor, rows: Tensor, lengths: Sequence[int], after: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """One round, from spans of these `lengths` to the lengths `after`.

    Takes and returns features (n, d), the number of tokens that each represents, and their rows.
    """
    from tokencomp.kernels import merge_rows

    wide = x.float()
    similarity = cosine_similarity(wide, wide.roll(-1, 0), dim=1)
    ends = torch.from_numpy(np.cumsum(lengths) - 1).to(x.device)  # no next token in their span
    similarity = similarity.index_fill(0, ends, -torch.inf)
    fewer = [length - count for length, count in zip(lengths, after, strict=True)]
    # Tokens that are merged into the token before them; the others begin a run.
    joined = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    joined.index_fill_(0, best_rows(similarity, fewer, lengths) + 1, 1)
    first = rows_where(joined == 0, sum(after))
    target = first.index_select(0, (1 - joined).cumsum(0) - 1)
    merged = merge_rows(x, target, first, sizes, frames=lengths)
    return merged.x, merged.sizes, rows.index_select(0, first)
