"""Comparator: what has not changed since the frame before, of an earlier chunk too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import cosine_similarity

from tokencomp.reducers._batch import previous_similarity
from tokencomp.reducers._rows import finite_features
from tokencomp.reducers.base import Reducer
from tokencomp.reducers.evs import least_similar
from tokencomp.reducers.registry import register_reducer
from tokencomp.tokens.patches import Patches
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
        known = [number for number, frame in enumerate(before) if frame is not None]
        if known:
            old = torch.cat([frame.to(x.device).float() for frame in before if frame is not None])
            starts, areas = patches.starts, [h * w for _, h, w in batch.grids]
            rows = patches.table(np.concatenate([starts[s] + np.arange(areas[s]) for s in known]))
            similarity[rows] = cosine_similarity(x[rows].float(), old, dim=-1)
        return least_similar(patches, similarity, [frame is not None for frame in before])
