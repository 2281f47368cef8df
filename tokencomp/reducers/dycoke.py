"""Comparator: merging of what does not change in groups of four frames."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import cosine_similarity

from tokencomp.plan.counts import split_evenly
from tokencomp.plan.reducer import Traits
from tokencomp.reducers._batch import best_rows, finite_features
from tokencomp.reducers.published import Published
from tokencomp.reducers.registry import register_reducer
from tokencomp.tokens.kept import Kept
from tokencomp.tokens.tokens import Tokens, evenly

GROUP = 4
REFERENCE = np.array([0, 0, 0, 2])  # frame of the group that each frame is compared with
LARGEST = 1 - 1 / GROUP


@register_reducer("dycoke")
@dataclass(frozen=True)
class DyCoke(Published):
    """Drop tokens that repeat the same place of an earlier frame of their group of four.

    The first stage of DyCoke (arXiv 2411.15024): the first frame of every group stays whole; of the
    second and third the tokens least similar (cosine) to the first stay, of the fourth those least
    similar to the third. All of these frames keep as many tokens, up to one, as the ratio leaves.

    Notes
    -----
    The rule removes at most 0.75, where only the first frames of groups are left. Above, these keep
    evenly spaced tokens, as many each; this is ours, and tables mark it (†). An image keeps evenly
    spaced tokens. Frames that are spans of their own (InternVL, SmolVLM) are such images: use
    another reducer there. Rows stay in raster order and an incomplete last group follows the same
    rule; the release orders them by similarity, skips the third frame of the last group and loses
    an odd last frame. The second stage, which chooses cache entries anew at every decoding step, is
    not here.
    """

    summary = "drop what repeats in groups of four frames, first stage (DyCoke 2411.15024)"
    traits = Traits(grid="whole", batched=True)

    def deviation(self, ratio: float, num_layers: int, frames: int = 0) -> str:
        if ratio <= LARGEST:
            return ""
        return f"thins out the first frames of groups; the paper's rule removes at most {LARGEST}"

    def reduce(self, tokens: Tokens) -> Kept:
        x = finite_features(tokens.features).float()
        quota, frames, reference, rank = [], list[int](), [], []
        for (t, h, w), budget in zip(tokens.grids, tokens.budgets, strict=True):
            frame, size = np.arange(t), h * w
            compared = frame // GROUP * GROUP + REFERENCE[frame % GROUP]
            places = np.arange(t * size) + np.repeat((compared - frame) * size, size)
            reference.append(places + sum(frames))
            first = frame % GROUP == 0
            whole = [size] * int(first.sum())
            share = split_evenly(min(budget, sum(whole)), whole)
            rest = split_evenly(budget - sum(share), [size] * (t - len(whole)))
            own = np.empty(t, dtype=np.int64)
            own[first], own[~first] = share, rest
            # 0: by similarity; 1 and -1: before and behind all others, because of the place alone
            order = np.zeros((t, size), dtype=np.int64)
            order[first] = -1
            for number in np.flatnonzero(first):
                order[number, evenly(size, own[number])] = 1
            rank.append(order.flatten())
            quota += own.tolist()
            frames += [size] * t
        similarity = cosine_similarity(
            x, x.index_select(0, tokens.table(np.concatenate(reference)))
        )
        at = tokens.table(np.concatenate(rank))
        score = torch.where(at == 0, -similarity, at * torch.inf)
        return Kept(best_rows(score, quota, frames))
