"""EVS: drop tokens that do not change from frame to frame (arXiv 2510.14624)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tokencomp.reducers import Kept, Published, Tokens, Traits, register_reducer
from tokencomp.reducers.base import best_rows, finite_features
from tokencomp.tokens.stacks import HostIndex, Stack, by_stack
from tokencomp.tokens.tokens import evenly


@register_reducer("evs")
@dataclass(frozen=True)
class EVS(Published):
    """Drop tokens that repeat the same place of the frame before (EVS, arXiv 2510.14624).

        s_{t,p} = cos(x_{t,p}, x_{t-1,p}) at place p of frame t > 0

    The first frame is kept whole; of all others the tokens of smallest s are kept, over the whole
    video.

    Rules where the paper has none (ours):

    - If the budget is smaller than a frame, the first frame gets half of it, evenly spaced (tables
      mark this, †).
    - An image keeps evenly spaced tokens, as in `uniform`; so does every frame that is a span
      (InternVL, SmolVLM): use another reducer there.
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
    """The patches of smallest similarity (n,) to the frame before, ascending.

    `compared` says of every span whether its first frame is compared too. If not, that frame is
    kept whole, or evenly spaced tokens of it.
    """
    # Order of choice: 1 first, -1 last, 0 in between by similarity.
    fixed = []
    grids = zip(tokens.grids, tokens.budgets, compared, strict=True)
    for (t, h, w), budget, known in grids:
        rank = np.zeros(t * h * w, dtype=np.int64)
        if not known:
            rank[: h * w] = 1
            if budget < h * w:
                rank[: h * w] = -1
                rank[evenly(h * w, budget if t == 1 else -(-budget // 2))] = 1
        fixed.append(rank)
    score = dissimilarity(tokens, similarity, fixed)
    return best_rows(score, tokens.budgets, tokens.lengths)


def dissimilarity(tokens: Tokens, similarity: Tensor, fixed: list[HostIndex]) -> Tensor:
    """-similarity (n,) as a score; where `fixed` is 1 or -1 instead of 0, it is ±inf."""
    sign = tokens.table(np.concatenate(fixed))
    return torch.where(sign == 0, -similarity, sign * torch.inf)


def previous_similarity(tokens: Tokens, x: Tensor) -> Tensor:
    """s_{t,p} of every patch, float32, shape (n,), of whole spans; first frames have no meaning."""
    from tokencomp.kernels import nearest_previous_frame

    def of_stack(_: HostIndex, stack: Stack, rows: Tensor) -> Tensor:
        similarity: Tensor = nearest_previous_frame(rows[:, None])[:, 0]  # as frames of one video
        return similarity

    return by_stack(tokens.frame_lengths(), of_stack, x, limit=math.inf)
