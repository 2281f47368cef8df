"""DyCoke: temporal token merging in groups of four frames (arXiv 2411.15024)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch.nn.functional import cosine_similarity

from tokencomp.plan.counts import split_evenly
from tokencomp.reducers import Kept, Published, Tokens, Traits, register_reducer
from tokencomp.reducers.base import best_rows, finite_features
from tokencomp.reducers.evs import dissimilarity
from tokencomp.tokens.tokens import evenly

GROUP = 4
REFERENCE = np.array([0, 0, 0, 2])  # frame of the group that each frame is compared with
LARGEST = 1 - 1 / GROUP  # largest ratio of the published rule


@register_reducer("dycoke")
@dataclass(frozen=True)
class DyCoke(Published):
    """Drop tokens that repeat the same place of an earlier frame of their group of four.

    The first stage (TTM) of DyCoke (arXiv 2411.15024). In a group of frames 0 … 3, with x_{t,p} the
    token at place p of frame t,

        frame 0: all tokens are kept
        frames 1 … 3: the tokens of smallest cos(x_{t,p}, x_{ref(t),p}), ref = 0, 0, 2

    and frames 1 … 3 have equal keep counts, up to one.

    Deviations from the release:

    - The rule removes at most 0.75. Above that ratio, first frames keep evenly spaced tokens,
      equally many each; tables mark this (†, ours). So does an image, and every frame that is a
      span (InternVL, SmolVLM): use another reducer there.
    - Tokens stay in raster order; the release orders them by similarity.
    - An incomplete last group follows the same rule; the release skips its third frame and loses an
      odd last frame.
    - The second stage, which chooses cache entries anew at every decoding step, is left out.
    """

    summary = "drop what repeats in groups of four frames, first stage (DyCoke 2411.15024)"
    traits = Traits(grid="whole", batched=True)

    def deviation(self, ratio: float, num_layers: int, frames: int = 0) -> str:
        if ratio <= LARGEST:
            return ""
        return f"thins out the first frames of groups; the paper's rule removes at most {LARGEST}"

    def reduce(self, tokens: Tokens) -> Kept:
        x = finite_features(tokens.features).float()
        quota, frames, reference, fixed = [], list[int](), [], []
        for (t, h, w), budget in zip(tokens.grids, tokens.budgets, strict=True):
            # The patch of the reference frame that every patch is compared with.
            frame, size = np.arange(t), h * w
            compared = frame // GROUP * GROUP + REFERENCE[frame % GROUP]
            patches = np.arange(t * size) + np.repeat((compared - frame) * size, size)
            reference.append(patches + sum(frames))
            # First frames of groups are kept whole if the budget allows; the others share the rest.
            first = frame % GROUP == 0
            whole = [size] * int(first.sum())
            counts = np.empty(t, dtype=np.int64)
            counts[first] = split_evenly(min(budget, sum(whole)), whole)
            rest = budget - int(counts[first].sum())
            counts[~first] = split_evenly(rest, [size] * (t - len(whole)))
            rank = np.zeros((t, size), dtype=np.int64)
            rank[first] = -1
            for number in np.flatnonzero(first):
                rank[number, evenly(size, counts[number])] = 1
            fixed.append(rank.flatten())
            quota += counts.tolist()
            frames += [size] * t
        rows = tokens.table(np.concatenate(reference))
        score = dissimilarity(tokens, cosine_similarity(x, x.index_select(0, rows)), fixed)
        return Kept(best_rows(score, quota, frames))
