"""VidCom²: uniqueness within frame and video (arXiv 2505.14454)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from tokencomp.plan.counts import frame_budgets
from tokencomp.reducers import Kept, Reducer, Tokens, Traits, register_reducer
from tokencomp.reducers.base import best_rows, finite_features
from tokencomp.tokens.stacks import HostIndex, Stack, by_stack
from tokencomp.tokens.tokens import Grid

TEMPERATURE = 0.01  # of the softmax over frames
BANDWIDTHS = tuple(2.0**k for k in range(-3, 2))


@register_reducer("vidcom2")
@dataclass(frozen=True)
class VidCom2(Reducer):
    """Keep tokens unlike their video and their frame; unusual frames keep more.

    VidCom² (arXiv 2505.14454), on unit tokens x_i in the half of the channels of lowest variance:

        G(x, y) = Σ_k exp(-‖x - y‖² / (2·2^k)),  k = -3 … 1
        s_i     = G(x_i, mean of the video) + G(x_i, mean of the frame)
        u_t     = -mean over frame t of G(x_i, mean of the video)
        K_t     = K/T · (1 + softmax_t(u_t / 0.01) - 1/T)

    The K_t tokens of smallest s of every frame are kept.

    Deviations from the release:

    - K_t is rounded by largest remainders, so that the sum is exact (ours). vLLM's copy rounds in
      another way (Jaccard of the kept sets 0.97 over 100 random cases).
    - The video is the span: on an image, and if every frame is a span (InternVL, SmolVLM), video
      and frame are the same, and all frames keep the same share.
    """

    summary = "uniqueness within frame and video, per-frame budgets (VidCom2 2505.14454)"
    traits = Traits(grid="whole", batched=True)

    def reduce(self, tokens: Tokens) -> Kept:
        x, grids = tokens.features.float(), tokens.grids

        def of_stack(spans: HostIndex, _: Stack, rows: Tensor) -> Tensor:
            return values_of(grids[spans[0]], rows)

        values = by_stack(tokens.lengths, of_stack, x, keys=grids, limit=math.inf)
        # One device read gives -u for every frame and tells whether the features are finite.
        total = torch.linalg.vector_norm(x, dim=1).sum()
        *means, total = torch.cat([values[:, 1], total[None]]).tolist()
        if not math.isfinite(total):
            finite_features(x)
        quota, first = [], 0
        for (t, h, w), budget in zip(grids, tokens.budgets, strict=True):
            minus_u = np.asarray(means[first : first + t * h * w : h * w], dtype=np.float32)
            logits = -minus_u / TEMPERATURE
            share = np.exp(logits - logits.max())
            share /= share.sum()
            quota += frame_budgets((1 + share - 1 / t).tolist(), budget, [h * w] * t)
            first += t * h * w
        return Kept(best_rows(-values[:, 0], quota, tokens.frame_lengths()))


def values_of(grid: Grid, x: Tensor) -> Tensor:
    """s_i, and the mean of G with the video over the frame, float32, (spans, t·h·w, 2).

    `x` (spans, t·h·w, d) are spans of the same grid.
    """
    t, h, w = grid
    quiet = x.var(1, unbiased=False).sort(stable=True).indices
    quiet = quiet[:, : max(1, x.shape[2] // 2)]
    x = x.gather(2, quiet[:, None].expand(-1, x.shape[1], -1))
    frames = normalize(x, dim=2).view(len(x), t, h * w, -1)
    video = similarity(frames, frames.mean((1, 2), keepdim=True))
    local = similarity(frames, frames.mean(2, keepdim=True))
    mean = video.mean(2, keepdim=True).expand_as(video)
    return torch.stack([video + local, mean], dim=-1).flatten(1, 2)


def similarity(x: Tensor, centre: Tensor) -> Tensor:
    """G between x (…, c) and `centre`, shape (…)."""
    squared = (x - centre).square().sum(-1)
    return torch.stack([torch.exp(-squared / (2 * a)) for a in BANDWIDTHS]).sum(0)
