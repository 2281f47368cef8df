"""Comparator: budgets of frames by the curvature of the video's path."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from tokencomp.plan.counts import frame_budgets
from tokencomp.plan.reducer import Traits
from tokencomp.reducers._batch import best_rows, feature_norms, finite_features, min_max, segment
from tokencomp.reducers.base import Reducer
from tokencomp.reducers.registry import register_reducer
from tokencomp.tokens.kept import Kept
from tokencomp.tokens.tokens import Tokens

TEMPERATURE = 0.7


@register_reducer("vcast")
@dataclass(frozen=True)
class VCast(Reducer):
    """Keep more of the frames where a video turns, and there the tokens unlike their frame.

    V-CAST (arXiv 2603.27650). f_t is the direction of the mean token of frame t, and its curvature
    κ_t = 1 - cos(f_t - f_{t-1}, f_{t+1} - f_t), 1 at both ends. Frames share the budget by
    softmax(κ / 0.7); every frame keeps one token where the budget allows it. In a frame the tokens
    with the largest (1 - cos(x, f_t)) + ‖x‖, the lengths scaled to 0 … 1 in the frame, stay.

    Notes
    -----
    Left-over tokens go to the largest remainders; the release gives them all to the frame of the
    largest remainder, up to a whole frame more. An image and a video of one frame, which the
    release leaves alone, are scored as a frame. Frames of which nothing is left are skipped.
    """

    summary = "budgets of frames by curvature, tokens unlike their frame (V-CAST 2603.27650)"
    traits = Traits(grid="known", batched=True)

    def reduce(self, tokens: Tokens) -> Kept:
        frames = [[n for n in own if n] for own in tokens.per_frame()]
        lengths = list(itertools.chain(*frames))
        x = tokens.features.float()
        norms = feature_norms(x)
        means = normalize(frame_means(x, lengths), dim=1)
        # One read, for the budgets of all frames and for whether the features are finite.
        *curves, total = torch.cat([curvature(means), norms.sum()[None]]).tolist()
        if not math.isfinite(total):
            finite_features(x)
        quota: list[int] = []
        for own, budget in zip(frames, tokens.budgets, strict=True):
            bends = [1.0, *curves[len(quota) + 1 : len(quota) + len(own) - 1], 1.0][: len(own)]
            weights = [math.exp(bend / TEMPERATURE) for bend in bends]
            quota += frame_budgets(weights, budget, own, least=1)
        rows = torch.repeat_interleave(means, tokens.table(lengths), dim=0, output_size=len(x))
        score = 1 - cosine_similarity(x, rows, dim=1) + min_max(norms, lengths)
        return Kept(best_rows(score, quota, lengths))


def frame_means(x: Tensor, lengths: Sequence[int]) -> Tensor:
    """Mean row of every frame of x (n, d), shape (frames, d)."""
    return segment(x, lengths, "sum") / torch.tensor(lengths, device=x.device)[:, None]


def curvature(means: Tensor) -> Tensor:
    """1 - cosine of the steps to and from every mean (frames, d), shape (frames,); 1 at the ends.

    Values at the ends of the videos of a batch mean nothing.
    """
    steps = means.diff(dim=0)
    inner = 1 - cosine_similarity(steps[:-1], steps[1:], dim=1)
    return torch.nn.functional.pad(inner, (1, 1), value=1.0)[: len(means)]
