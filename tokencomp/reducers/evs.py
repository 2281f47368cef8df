"""Comparator: efficient video sampling."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tokencomp.reducers._rows import finite_features, keep_patches, whole_grid
from tokencomp.reducers.base import Reducer
from tokencomp.reducers.registry import register_reducer
from tokencomp.tokens import Reduction, VisualTokens


@register_reducer("evs")
@dataclass(frozen=True)
class EVS(Reducer):
    """Drop tokens that repeat the same place of the frame before (EVS, arXiv 2510.14624).

    The first frame stays whole; of the others, the tokens least similar (cosine) to the same
    place of their previous frame stay, over the whole video.

    Notes
    -----
    Two rules are ours, because the paper has none. If the budget is smaller than one frame, the
    first frame gets half of it, evenly spaced. An image has no previous frame and keeps the evenly
    spaced tokens that `uniform` keeps. The same happens to every frame of a video where the model
    gets each frame as a span of its own (InternVL, SmolVLM); use another reducer there.
    """

    summary = "drop tokens unchanged since the previous frame (EVS 2510.14624)"
    whole_spans = True

    def reduce(self, tokens: VisualTokens, keep: int) -> Reduction:
        from tokencomp.kernels import nearest_previous_frame, topk_stable

        t, h, w = tokens.grid
        rows, budget = whole_grid(tokens, keep, "evs")
        x = finite_features(tokens.features[rows])
        score = -nearest_previous_frame(x.view(t, h, w, -1))[0].flatten()
        if budget < h * w:
            first = budget if t == 1 else -(-budget // 2)
            steps = torch.arange(first, device=x.device)
            score[: h * w] = -torch.inf
            score[(2 * steps + 1) * h * w // (2 * first)] = torch.inf
        return keep_patches(tokens, rows[topk_stable(score, budget)])
