"""V-CAST: frame budgets by the curvature of the video's path (arXiv 2603.27650)."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from tokencomp.plan.counts import frame_budgets
from tokencomp.reducers import Kept, Reducer, Tokens, Traits, register_reducer
from tokencomp.reducers._batch import min_max, segment
from tokencomp.reducers.base import best_rows, finite_features

TEMPERATURE = 0.7


@register_reducer("vcast")
@dataclass(frozen=True)
class VCast(Reducer):
    """Give more tokens to frames where the video turns, and keep there the tokens unlike their
    frame.

    V-CAST (arXiv 2603.27650), with the unit mean token f_t of frame t:

        κ_t = 1 - cos(f_t - f_{t-1}, f_{t+1} - f_t),  1 at both ends
        K_t ∝ softmax_t(κ_t / 0.7)                    tokens of frame t, at least one if possible
        s_i = (1 - cos(x_i, f_t)) + ‖x_i‖             norms min-max scaled within the frame

    The K_t tokens of largest s of every frame are kept.

    Deviations from the release:

    - Rounding is by largest remainders; it gives all remaining tokens to the frame of the largest
      remainder, up to a whole frame more.
    - An image, or a video of one frame, is scored as a frame; it does not compress these.
    - Frames without tokens after an earlier stage are skipped.
    """

    summary = "budgets of frames by curvature, tokens unlike their frame (V-CAST 2603.27650)"
    traits = Traits(grid="known", batched=True)

    def reduce(self, tokens: Tokens) -> Kept:
        frames = [[n for n in counts if n] for counts in tokens.per_frame()]
        lengths = list(itertools.chain(*frames))
        x = tokens.features.float()
        norms = torch.linalg.vector_norm(x, dim=1)
        means = segment(x, lengths, "sum") / torch.tensor(lengths, device=x.device)[:, None]
        means = normalize(means, dim=1)
        # One device read gives κ and tells whether the features are finite.
        *kappa, total = torch.cat([curvature(means), norms.sum()[None]]).tolist()
        if not math.isfinite(total):
            finite_features(x)
        # Frames share the budget by exp(κ / τ); the first and last frame have κ = 1.
        quota: list[int] = []
        for counts, budget in zip(frames, tokens.budgets, strict=True):
            inner = kappa[len(quota) + 1 : len(quota) + len(counts) - 1]
            of_video = [1.0, *inner, 1.0][: len(counts)]
            weights = [math.exp(value / TEMPERATURE) for value in of_video]
            quota += frame_budgets(weights, budget, counts, least=1)
        # Within a frame: tokens unlike its mean, with large norms.
        rows = torch.repeat_interleave(means, tokens.table(lengths), dim=0, output_size=len(x))
        score = 1 - cosine_similarity(x, rows, dim=1) + min_max(norms, lengths)
        return Kept(best_rows(score, quota, lengths))


def curvature(means: Tensor) -> Tensor:
    """κ of every frame from `means` (frames, d), shape (frames,).

    Frames of all videos follow each other, so the values at the ends of a video have no meaning.
    """
    steps = means.diff(dim=0)
    inner = 1 - cosine_similarity(steps[:-1], steps[1:], dim=1)
    return torch.nn.functional.pad(inner, (1, 1), value=1.0)[: len(means)]
