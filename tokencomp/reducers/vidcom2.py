"""Comparator: video compression commander."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from tokencomp.plan.counts import frame_budgets
from tokencomp.plan.reducer import Traits
from tokencomp.reducers._batch import best_rows, feature_norms, finite_features
from tokencomp.reducers.base import Reducer
from tokencomp.reducers.registry import register_reducer
from tokencomp.tokens.kept import Kept
from tokencomp.tokens.spans import Grid
from tokencomp.tokens.stacks import HostIndex, Stack, by_stack
from tokencomp.tokens.tokens import Tokens

TEMPERATURE = 0.01  # of the softmax over frames
BANDWIDTHS = tuple(2.0**k for k in range(-3, 2))


@register_reducer("vidcom2")
@dataclass(frozen=True)
class VidCom2(Reducer):
    """Keep tokens unlike their video and their frame; unusual frames keep more.

    VidCom² (arXiv 2505.14454): over the half of the channels with the lowest variance, every
    unit-length token is compared with the mean token of the video and of its frame (sum of
    Gaussians, bandwidths 1/8 … 2). The least similar tokens of each frame stay; frame budgets are
    base · (1 + softmax(u / 0.01) - 1/T), u the frame's mean dissimilarity from the video.

    Notes
    -----
    Budgets are rounded by largest remainders, so that the count is exact (ours); vLLM's copy rounds
    them in another way (Jaccard of the kept sets 0.97 over 100 random cases). "The video" is the
    span. On an image, and on models that get every frame as a span of its own (InternVL,
    SmolVLM), video and frame are the same, and every frame keeps the same share of its tokens.
    """

    summary = "uniqueness within frame and video, per-frame budgets (VidCom2 2505.14454)"
    traits = Traits(grid="whole", batched=True)

    def reduce(self, tokens: Tokens) -> Kept:
        x, grids = tokens.features.float(), tokens.grids

        def of_stack(spans: HostIndex, _: Stack, rows: Tensor) -> Tensor:
            return values_of(grids[spans[0]], rows)

        values = by_stack(tokens.lengths, of_stack, x, keys=grids, limit=math.inf)
        frames = [h * w for t, h, w in grids for _ in range(t)]
        # One read for the budgets of all frames, which depend on the features, and for whether
        # these are finite.
        *means, norms = torch.cat([values[:, 1], feature_norms(x).sum()[None]]).tolist()
        if not math.isfinite(norms):
            finite_features(x)
        quota, first = [], 0
        for (t, h, w), budget in zip(grids, tokens.budgets, strict=True):
            own = np.asarray(means[first : first + t * h * w : h * w], dtype=np.float32)
            logits = -own / TEMPERATURE
            share = np.exp(logits - logits.max())
            share /= share.sum()
            quota += frame_budgets((1 + share - 1 / t).tolist(), budget, [h * w] * t)
            first += t * h * w
        return Kept(best_rows(-values[:, 0], quota, frames))


def values_of(grid: Grid, x: Tensor) -> Tensor:
    """Similarity of patches x (spans, t·h·w, d) with video and frame, and the mean of the frame.

    Both are float32, (spans, t·h·w, 2).
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
    """Sum of Gaussians of the distance between x (…, c) and centre, shape (…)."""
    squared = (x - centre).square().sum(-1)
    return torch.stack([torch.exp(-squared / (2 * a)) for a in BANDWIDTHS]).sum(0)
