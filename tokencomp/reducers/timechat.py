"""TimeChat-Online: tokens that change in a stream (arXiv 2504.17343)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import cosine_similarity

from tokencomp.reducers import Kept, Reducer, Tokens, Traits, finite_features, register_reducer
from tokencomp.reducers.evs import least_similar, previous_similarity
from tokencomp.tokens.signals import FRAMES


@register_reducer("timechat")
@dataclass(frozen=True)
class TimeChat(Reducer):
    """Drop tokens that repeat the same place of the frame before (TimeChat-Online, 2504.17343).

        s_{t,p} = cos(x_{t,p}, x_{t-1,p}) at place p of frame t;  the tokens of smallest s are kept

    The first frame of a chunk is compared with the last frame of the previous chunk: of the same
    prompt, or of an earlier turn on the same cache, as in a `tokencomp.Session`. An image is
    compared with the last image of its shape. Places whose row was evicted from the cache come
    first. Tokens keep their positions.

    Deviations from the paper:

    - It drops all tokens above a threshold; here the ratio decides how many are kept.
    - If there is no frame before, the rules of `evs` choose.
    """

    summary = "drop tokens unchanged since the frame before, in a stream (2504.17343, exact count)"
    traits = Traits(grid="whole", batched=True, entry_only=True)
    needs = frozenset({FRAMES})

    def reduce(self, tokens: Tokens) -> Kept:
        x = finite_features(tokens.features)
        similarity = previous_similarity(tokens, x)
        # First frames are compared with the frame before the span, where there is one.
        before = tokens.frames or [None] * len(tokens)
        known = [number for number, frame in enumerate(before) if frame is not None]
        if known:
            old = torch.cat([frame.to(x.device).float() for frame in before if frame is not None])
            starts, areas = tokens.starts, [h * w for _, h, w in tokens.grids]
            rows = tokens.table(np.concatenate([starts[s] + np.arange(areas[s]) for s in known]))
            alike = cosine_similarity(x[rows].float(), old, dim=-1)
            similarity[rows] = alike.nan_to_num(-2.0)  # nothing is known of the place: it stays
        return Kept(least_similar(tokens, similarity, [frame is not None for frame in before]))
