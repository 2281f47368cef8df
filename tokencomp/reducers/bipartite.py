"""Bipartite similarity merging (AIM, arXiv 2412.03248; ToMe, arXiv 2210.09461)."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tokencomp.plan.counts import split_evenly
from tokencomp.reducers import Kept, Reducer, Tokens, Traits, register_reducer
from tokencomp.reducers._batch import complement
from tokencomp.reducers.base import best_rows, finite_features


@register_reducer("bipartite")
@dataclass(frozen=True)
class Bipartite(Reducer):
    """Merge the most similar tokens of every frame until the budget is met.

    One step on the N tokens of a frame, split into a ∈ A (even indices) and b ∈ B (odd indices):

        b(a) = argmax_b cos(x_a, x_b)
        merge the r ≤ ⌊N/2⌋ pairs (a, b(a)) of largest cosine into their means

    Steps with the largest possible r repeat, as in AIM's 196 → 98 → 49.

    Deviations from AIM's release:

    - Projected tokens are compared, as there for videos; for images it compares keys of CLIP.
    - Tokens stay in raster order, a merged one at the index of b; the release reorders where r <
      N/2.
    - If a video has a smaller budget than frames, neighbouring frames are merged as one (ours).
    - If frames differ in length after an earlier stage, every frame that has tokens keeps
      one, and the rest of the budget is split in proportion to what the frames have (ours).

    Attributes
    ----------
    weighted
        True (ours): means are weighted by the number of tokens that a row represents, as in ToMe.
        False: AIM's plain mean of means.
    """

    weighted: bool = True

    summary = "similarity merging inside each frame (AIM 2412.03248, ToMe 2210.09461)"
    traits = Traits(merges=True, batched=True)

    def reduce(self, tokens: Tokens) -> Kept:
        x = finite_features(tokens.features)
        # Groups within which tokens merge: frames of a video, or the whole image.
        groups, quota = [], []
        per_frame = tokens.per_frame()
        for number, budget in enumerate(tokens.budgets):
            runs = [tokens.lengths[number]]
            if tokens.grids[number][0] > 1:
                runs = frame_runs(per_frame[number], budget)
            groups += runs
            quota += [1 + q for q in split_evenly(budget - len(runs), [n - 1 for n in runs])]
        x, sizes, rows = self._merge(x, tokens.all_weights(), groups, quota)
        return Kept.ascending(rows, x, sizes)

    def _merge(
        self, x: Tensor, sizes: Tensor, lengths: list[int], quota: list[int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Merge every group down to its quota; returns the rows, how many tokens each represents,
        and their indices.

        A group that has met its quota is taken out, so that no rounding depends on the other
        groups.
        """
        done: list[tuple[Tensor, Tensor, Tensor]] = []
        rows = torch.arange(len(x), device=x.device)
        while True:
            # A round merges at most half of a group; finished groups are set aside.
            steps = [min(n - q, n // 2) for n, q in zip(lengths, quota, strict=True)]
            finished = [step == 0 for step in steps]
            if all(finished):
                done.append((x, sizes, rows))
                break
            if any(finished):
                end = np.repeat(finished, lengths)
                ended, active = (
                    torch.from_numpy(np.flatnonzero(part)).to(x.device) for part in (end, ~end)
                )
                done.append((x[ended], sizes[ended], rows[ended]))
                x, sizes, rows = x[active], sizes[active], rows[active]
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

        # Even tokens with the most similar partners among the odd ones merge into these.
        similarity, partner = bipartite_match(x, lengths)
        merged = best_rows(similarity, steps, lengths)
        target = torch.arange(len(x), device=x.device)
        target = target.index_copy(0, merged, partner.to(target).index_select(0, merged))
        keep = complement(merged, len(x))
        how = {"frames": lengths, "weighted": self.weighted}
        x, sizes = merge_rows(x, target, keep, sizes, **how)
        return x, sizes, rows.index_select(0, keep)


def frame_runs(per_frame: list[int], budget: int) -> list[int]:
    """Lengths of at most `budget` runs of frames; tokens merge within a run."""
    frames = [n for n in per_frame if n]
    runs = split_evenly(len(frames), [1] * min(len(frames), budget))
    bounds = itertools.accumulate(runs, initial=0)
    return [sum(frames[a:b]) for a, b in itertools.pairwise(bounds)]
