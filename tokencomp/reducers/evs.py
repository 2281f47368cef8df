"""Comparator: efficient video sampling."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tokencomp.reducers._rows import finite_rows, joined, whole_grid
from tokencomp.reducers.base import Reducer, register_reducer
from tokencomp.tokens import Reduction, VisualTokens


@register_reducer("evs")
@dataclass(frozen=True)
class EVS(Reducer):
    """Drop what the frame before showed at the same place (EVS, arXiv 2510.14624).

    The first frame stays whole; of the others, the tokens least similar (cosine) to the same
    place of their previous frame stay, over the whole video.

    Notes
    -----
    Ours, where the paper is silent: if the budget is smaller than one frame, the first frame gets
    half of it, evenly spaced. An image has no previous frame: it keeps the evenly spaced tokens
    that `uniform` keeps. So does every frame of a video where the model gets each as a span of its
    own (InternVL, SmolVLM): take another reducer there.
    """

    summary = "drop tokens unchanged since the previous frame (EVS 2510.14624)"
    serving_safe = True
    whole_spans = True

    def reduce(self, tokens: VisualTokens, keep: int) -> Reduction:
        from tokencomp.kernels import nearest_previous_frame, topk_stable

        t, h, w = tokens.grid
        rows = whole_grid(tokens, "evs")
        x = tokens.features[rows]
        finite_rows(x)
        score = -nearest_previous_frame(x.view(t, h, w, -1))[0].flatten()
        budget = keep - int(tokens.special.sum())
        if budget < h * w:
            first = budget if t == 1 else -(-budget // 2)
            steps = torch.arange(first, device=x.device)
            score[: h * w] = -torch.inf
            score[(2 * steps + 1) * h * w // (2 * first)] = torch.inf
        return joined(tokens, rows[topk_stable(score, budget)])
