"""Comparator: video compression commander."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from tokencomp.errors import OptionError
from tokencomp.plan.counts import frame_budgets
from tokencomp.reducers._rows import feature_norms, finite_features
from tokencomp.reducers.base import Reducer
from tokencomp.reducers.registry import register_reducer
from tokencomp.tokens.patches import Patches
from tokencomp.tokens.reduction import Reduction
from tokencomp.tokens.spans import Grid, SpanBatch
from tokencomp.tokens.stacks import by_stack
from tokencomp.validation import check_range

BANDWIDTHS = tuple(2.0**k for k in range(-3, 2))


@register_reducer("vidcom2")
@dataclass(frozen=True)
class VidCom2(Reducer):
    """Keep tokens unlike their video and their frame; unusual frames keep more.

    VidCom² (arXiv 2505.14454): over the half of the channels with the lowest variance, every
    unit-length token is compared with the mean token of the video and of its frame (sum of
    Gaussians, bandwidths 1/8 … 2). The least similar tokens of each frame stay; frame budgets are
    base · (1 + softmax(u / τ) - 1/T), u the frame's mean dissimilarity from the video.

    Attributes
    ----------
    temperature
        τ of the softmax over frames, 1e-6 … 1.
    channels
        Fraction of channels that count.

    Notes
    -----
    Budgets are rounded by largest remainders, so that the count is exact (ours); vLLM's copy rounds
    them in another way (Jaccard of the kept sets 0.97 over 100 random cases). "The video" is the
    span. On an image, and on models that get every frame as a span of its own (InternVL,
    SmolVLM), video and frame are the same, and every frame keeps the same share of its tokens.
    """

    temperature: float = 0.01
    channels: float = 0.5

    summary = "uniqueness within frame and video, per-frame budgets (VidCom2 2505.14454)"
    grid = "whole"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("vidcom2", "temperature", self.temperature, 1e-6, 1)
        if not 0 < self.channels <= 1:
            raise OptionError(f"vidcom2: channels={self.channels!r}; allowed: a number in (0, 1].")

    def reduce_batch(self, batch: SpanBatch, keeps: Sequence[int]) -> Reduction:
        from tokencomp.kernels import topk_stable

        patches = Patches.whole(batch, keeps, "vidcom2")
        x, grids = patches.features.float(), batch.grids
        values = by_stack(
            patches.lengths,
            lambda m, _, rows: self._values(grids[m[0]], rows),
            x,
            keys=grids,
            limit=math.inf,
        )
        frames = [h * w for t, h, w in grids for _ in range(t)]
        # One read for the budgets of all frames, which depend on the features, and for whether
        # these are finite.
        *means, norms = torch.cat([values[:, 1], feature_norms(x).sum()[None]]).tolist()
        if not math.isfinite(norms):
            finite_features(x)
        quota, first = [], 0
        for (t, h, w), budget in zip(grids, patches.budgets, strict=True):
            own = np.asarray(means[first : first + t * h * w : h * w], dtype=np.float32)
            logits = -own / self.temperature
            share = np.exp(logits - logits.max())
            share /= share.sum()
            quota += frame_budgets((1 + share - 1 / t).tolist(), budget, [h * w] * t)
            first += t * h * w
        return patches.kept(topk_stable(-values[:, 0], quota, spans=frames))

    def _values(self, grid: Grid, x: Tensor) -> Tensor:
        """Similarity of every patch with its video and frame, and the mean of its frame.

        Parameters
        ----------
        x : Tensor, shape (spans, t·h·w, d)
            Of spans of one grid.

        Returns
        -------
        Tensor of float32, shape (spans, t·h·w, 2)
        """
        t, h, w = grid
        quiet = x.var(1, unbiased=False).sort(stable=True).indices
        quiet = quiet[:, : max(1, int(x.shape[2] * self.channels))]
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
