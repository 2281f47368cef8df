"""Comparator: what has not changed since the frame before, of an earlier chunk too."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from tokencomp.reducers._batch import finite_features
from tokencomp.reducers.evs import least_similar, previous_similarity
from tokencomp.reducers.registry import register_reducer
from tokencomp.reducers.score import ChoosingReducer
from tokencomp.tokens.patches import Patches
from tokencomp.tokens.signals import FRAMES, Signal


@register_reducer("timechat")
@dataclass(frozen=True)
class TimeChat(ChoosingReducer):
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

    def chosen(self, patches: Patches) -> Tensor:
        x, batch = finite_features(patches.features), patches.batch
        similarity = previous_similarity(patches, x)
        before = batch.frames or [None] * len(batch)
        known = [number for number, frame in enumerate(before) if frame is not None]
        if known:
            old = torch.cat([frame.to(x.device).float() for frame in before if frame is not None])
            starts, areas = patches.starts, [h * w for _, h, w in batch.grids]
            rows = patches.table(np.concatenate([starts[s] + np.arange(areas[s]) for s in known]))
            similarity[rows] = cosine_similarity(x[rows].float(), old, dim=-1)
        return least_similar(patches, similarity, [frame is not None for frame in before])
