"""Comparator: what has not changed since the frame before, of an earlier chunk too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokencomp.reducers._batch import Patches, previous_similarity
from tokencomp.reducers._rows import finite_features
from tokencomp.reducers.base import Reducer
from tokencomp.reducers.evs import least_similar
from tokencomp.reducers.registry import register_reducer
from tokencomp.tokens.reduction import Reduction
from tokencomp.tokens.signals import FRAMES, Signal
from tokencomp.tokens.spans import SpanBatch


@register_reducer("timechat")
@dataclass(frozen=True)
class TimeChat(Reducer):
    """Drop tokens that repeat the same place of the frame before (TimeChat-Online, 2504.17343).

    The first frame of a chunk is compared with the last frame of the chunk before it: of the same
    prompt, or of an earlier turn on the same cache, as in a `tokencomp.Session`. Images are
    compared with the last image of their shape. The tokens least similar (cosine) stay, and keep
    their positions.

    Notes
    -----
    The paper drops all tokens above a threshold; here as many stay as the ratio says. Where no
    frame came before, the rules of `evs` choose.
    """

    summary = "drop tokens unchanged since the frame before, in a stream (2504.17343, exact count)"
    grid = "whole"
    entry_only = True

    @property
    def needs(self) -> frozenset[Signal]:
        return frozenset({FRAMES})

    def reduce_batch(self, batch: SpanBatch, keeps: Sequence[int]) -> Reduction:
        patches = Patches.whole(batch, keeps, self.name)
        x = finite_features(patches.features)
        similarity = previous_similarity(patches, x)
        before = batch.frames or [None] * len(batch)
        for start, grid, frame in zip(patches.starts, batch.grids, before, strict=True):
            if frame is not None:
                rows = slice(start, start + grid[1] * grid[2])
                similarity[rows] = _cosine(x[rows], frame)
        return least_similar(patches, similarity, [frame is not None for frame in before])


def _cosine(new: Tensor, old: Tensor) -> Tensor:
    old = old.to(new.device)
    return torch.nn.functional.cosine_similarity(new.float(), old.float(), dim=-1)
