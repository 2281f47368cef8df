"""Comparator: video compression commander."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from tokencomp.errors import OptionError
from tokencomp.reducers._rows import finite_features, keep_patches, round_to_sum, whole_grid
from tokencomp.reducers.base import Reducer
from tokencomp.reducers.merge import best_per_group
from tokencomp.reducers.registry import register_reducer
from tokencomp.tokens import Reduction, VisualTokens
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
    whole_spans = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("vidcom2", "temperature", self.temperature, 1e-6, 1)
        if not 0 < self.channels <= 1:
            raise OptionError(f"vidcom2: channels={self.channels!r}; allowed: a number in (0, 1].")

    def reduce(self, tokens: VisualTokens, keep: int) -> Reduction:
        t, h, w = tokens.grid
        rows, budget = whole_grid(tokens, keep, "vidcom2")
        x = finite_features(tokens.features[rows].float())
        quiet = x.var(0, unbiased=False).sort(stable=True).indices
        quiet = quiet[: max(1, int(x.shape[1] * self.channels))]
        frames = normalize(x[:, quiet], dim=1).view(t, h * w, -1)
        video = similarity(frames, frames.mean((0, 1), keepdim=True))
        local = similarity(frames, frames.mean(1, keepdim=True))
        share = torch.softmax(-video.mean(1) / self.temperature, 0)
        budgets = budget / t * (1 + share - 1 / t)
        quota = round_to_sum(budgets.tolist(), budget, h * w)
        chosen = best_per_group(-(video + local).flatten(), [h * w] * t, quota)
        return keep_patches(tokens, rows[chosen])


def similarity(x: Tensor, centre: Tensor) -> Tensor:
    """Sum of Gaussians of the distance between x (t, n, c) and centre, shape (t, n)."""
    squared = (x - centre).square().sum(-1)
    return torch.stack([torch.exp(-squared / (2 * a)) for a in BANDWIDTHS]).sum(0)
