"""Similarity merging (AIM stage A)."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tokencomp.plan.counts import split_evenly
from tokencomp.plan.reducer import Traits
from tokencomp.reducers._batch import best_rows, finite_features
from tokencomp.reducers.base import Reducer
from tokencomp.reducers.registry import register_reducer
from tokencomp.tokens.kept import Kept
from tokencomp.tokens.tokens import Tokens, rows_where


@register_reducer("bipartite")
@dataclass(frozen=True)
class Bipartite(Reducer):
    """Merge the most similar tokens of every frame until the budget is met.

    One step, per frame: tokens at even places look for their most similar token at an odd place
    (cosine); the r ≤ N // 2 best pairs merge. Steps repeat with r as large as possible, as in
    AIM's 196 → 98 → 49 (arXiv 2412.03248; the idea is ToMe's, arXiv 2210.09461).

    Attributes
    ----------
    weighted
        True (ours): means weighted by how many tokens a row stands for. False: AIM's plain mean
        of means.

    Notes
    -----
    What is compared are the projected tokens, as AIM does for videos; for images it compares keys
    of CLIP. A merged token has the place of its odd-placed member. Output stays in raster order
    (ours; the authors' code reorders where r < N/2). A video with fewer kept tokens than frames
    merges groups of neighbouring frames (ours). Where an earlier stage has left frames of
    different length, every frame that has tokens keeps one, and the rest of the budget is split in
    proportion to what is left of each (ours).
    """

    weighted: bool = True

    summary = "similarity merging inside each frame (AIM 2412.03248, ToMe 2210.09461)"
    traits = Traits(merges=True, batched=True)

    def reduce(self, tokens: Tokens) -> Kept:
        x = finite_features(tokens.features)
        groups, quota = [], []
        per_frame = tokens.per_frame()
        for number, budget in enumerate(tokens.budgets):
            own = [tokens.lengths[number]]
            if tokens.grids[number][0] > 1:
                own = frame_runs(per_frame[number], budget)
            groups += own
            quota += [1 + q for q in split_evenly(budget - len(own), [n - 1 for n in own])]
        x, sizes, places = self._merge(x, tokens.all_weights(), groups, quota)
        return Kept.ascending(places, x, sizes)

    def _merge(
        self, x: Tensor, sizes: Tensor, lengths: list[int], quota: list[int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Merge every group down to its quota; returns x, sizes and places of what is left.

        A group that has reached its quota takes no part in further steps, so that no rounding
        depends on the others.
        """
        done: list[tuple[Tensor, Tensor, Tensor]] = []
        rows = torch.arange(len(x), device=x.device)
        while True:
            steps = [min(n - q, n // 2) for n, q in zip(lengths, quota, strict=True)]
            finished = [step == 0 for step in steps]
            if all(finished):
                done.append((x, sizes, rows))
                break
            if any(finished):
                owner = np.repeat(finished, lengths)
                tables = [
                    torch.from_numpy(np.flatnonzero(part)).to(x.device) for part in (owner, ~owner)
                ]
                values = [[v.index_select(0, t) for v in (x, sizes, rows)] for t in tables]
                done.append((values[0][0], values[0][1], values[0][2]))
                x, sizes, rows = values[1]
                lengths, quota, steps = (
                    [v for v, end in zip(part, finished, strict=True) if not end]
                    for part in (lengths, quota, steps)
                )
            x, sizes, rows = self._step(x, sizes, rows, lengths, steps)
            lengths = [n - r for n, r in zip(lengths, steps, strict=True)]
        if len(done) == 1:
            return done[0]
        x, sizes, rows = (torch.cat(parts) for parts in zip(*done, strict=True))
        return x, sizes, rows

    def _step(
        self, x: Tensor, sizes: Tensor, rows: Tensor, lengths: list[int], steps: list[int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Merge the `steps` most similar pairs of every group."""
        from tokencomp.kernels import bipartite_match, merge_rows

        similarity, partner = bipartite_match(x, lengths)
        gone = best_rows(similarity, steps, lengths)
        target = torch.arange(len(x), device=x.device)
        target = target.index_copy(0, gone, partner.to(target).index_select(0, gone))
        left = torch.ones(len(x), dtype=torch.uint8, device=x.device).index_fill_(0, gone, 0)
        keep = rows_where(left, len(x) - sum(steps))
        how = {"frames": lengths, "weighted": self.weighted}
        x, sizes = merge_rows(x, target, keep, sizes, **how)
        return x, sizes, rows.index_select(0, keep)


def frame_runs(per_frame: list[int], budget: int) -> list[int]:
    """Lengths of the runs of frames inside which tokens may merge, at most `budget` runs."""
    frames = [n for n in per_frame if n]
    runs = split_evenly(len(frames), [1] * min(len(frames), budget))
    bounds = itertools.accumulate(runs, initial=0)
    return [sum(frames[a:b]) for a, b in itertools.pairwise(bounds)]
