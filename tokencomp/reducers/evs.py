"""Comparator: efficient video sampling."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tokencomp.plan.reducer import Traits
from tokencomp.reducers._batch import best_rows, finite_features
from tokencomp.reducers.published import Published
from tokencomp.reducers.registry import register_reducer
from tokencomp.tokens.kept import Kept
from tokencomp.tokens.stacks import HostIndex, Stack, by_stack, starts_of
from tokencomp.tokens.tokens import Tokens, evenly


@register_reducer("evs")
@dataclass(frozen=True)
class EVS(Published):
    """Drop tokens that repeat the same place of the frame before (EVS, arXiv 2510.14624).

    The first frame stays whole; of the others, the tokens of place p and frame t with the smallest
    cos(x_{t,p}, x_{t-1,p}) stay, over the whole video.

    Notes
    -----
    Two rules are ours, because the paper has none. If the budget is smaller than one frame, the
    first frame gets half of it, evenly spaced, which tables mark (†). An image has no previous
    frame and keeps the evenly spaced tokens that `uniform` keeps. The same happens to every frame
    of a video where the model gets each frame as a span of its own (InternVL, SmolVLM); use another
    reducer there.
    """

    summary = "drop tokens unchanged since the previous frame (EVS 2510.14624)"
    traits = Traits(grid="whole", batched=True)

    def deviation(self, ratio: float, num_layers: int, frames: int = 0) -> str:
        if (1.0 - ratio) * frames > 1.0 - 1e-6 or not frames:
            return ""
        return f"keeps less than one of {frames} frames; the paper's rule keeps the first one whole"

    def reduce(self, tokens: Tokens) -> Kept:
        similarity = previous_similarity(tokens, finite_features(tokens.features))
        return Kept(least_similar(tokens, similarity, [False] * len(tokens)))


def least_similar(tokens: Tokens, similarity: Tensor, compared: Sequence[bool]) -> Tensor:
    """The patches that are least similar to the frame before, ascending.

    Parameters
    ----------
    similarity : Tensor of float32, shape (n,)
    compared
        Of every span: whether its first frame has been compared too. If not, it stays whole, or
        evenly spaced tokens of it.
    """
    # 0: by similarity; 1 and -1: before and behind all others, because of the place alone
    rank = []
    grids = zip(tokens.grids, tokens.budgets, compared, strict=True)
    for (t, h, w), budget, known in grids:
        own = np.zeros(t * h * w, dtype=np.int64)
        if not known:
            own[: h * w] = 1
            if budget < h * w:
                own[: h * w] = -1
                own[evenly(h * w, budget if t == 1 else -(-budget // 2))] = 1
        rank.append(own)
    places = tokens.table(np.concatenate(rank))
    score = torch.where(places == 0, -similarity, places * torch.inf)
    return best_rows(score, tokens.budgets, tokens.lengths)


def previous_similarity(tokens: Tokens, x: Tensor) -> Tensor:
    """Cosine of every patch with the same place of the frame before, float32, shape (n,).

    -inf in first frames. Spans must be whole.
    """
    from tokencomp.kernels import nearest_previous_frame

    grids = tokens.grids
    firsts = starts_of([t for t, *_ in grids])[:-1]

    def of_stack(frames: HostIndex, _: Stack, rows: Tensor) -> Tensor:
        similarity: Tensor = nearest_previous_frame(rows[:, None])[:, 0]
        first = np.flatnonzero(np.isin(frames, firsts))  # the kernel knows of frame 0
        if len(first) == 1:
            return similarity
        return similarity.index_fill_(0, tokens.table(first), -torch.inf)

    return by_stack(tokens.frame_lengths(), of_stack, x, limit=math.inf)
