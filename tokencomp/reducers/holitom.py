"""HoliTom: static places merged over time (arXiv 2505.21334)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tokencomp.plan.counts import frame_budgets
from tokencomp.reducers import Kept, Reducer, Tokens, Traits, best_rows, register_reducer
from tokencomp.reducers._batch import with_merged
from tokencomp.reducers._clusters import cluster_sizes, cluster_sums, density_peaks
from tokencomp.reducers._segments import place_cosines, run_means, static_windows
from tokencomp.reducers.base import salient
from tokencomp.tokens.signals import TOWER_ATTENTION
from tokencomp.tokens.stacks import HostIndex

TAU, NEIGHBOURS, BETA = 0.8, 7, 0.6
Groups = list[tuple[HostIndex, int]]  # patches, and how many of them are kept


@register_reducer("holitom")
@dataclass(frozen=True)
class HoliTom(Reducer):
    """Merge static places over time, and keep of the rest what the vision tower attends to.

    HoliTom (arXiv 2505.21334), the part before the decoder:

        windows: maximise the rows saved by static places, cos(x_{t,p}, x_{t+1,p}) > τ = 0.8
                 in all frames of the window (dynamic programming, `static_segments`)
        static:  means over the window, in its first frame; the density peaks (DPC-KNN) c are kept,
                 x_c ← 0.6 · x_c + 0.4 · mean of the other members of its cluster
        moving:  in every frame, the tokens of largest attention in the tower

    A video without static places, and an image, is attention alone.

    Deviations from the release:

    - Static and moving rows share the budget in proportion to their number, by largest remainders;
      the release rounds every part.
    - If static means would leave fewer rows than the budget, only the most similar places are
      static (ours).
    - Contextual tokens among the moving ones are left out, as its scripts turn them off.
    - Tokens stay in raster order at their positions; it puts static rows first and renumbers
      positions.
    - τ is 0.8 at every ratio; its scripts use 0.65 at 10 %.
    - Merging inside the decoder is left out.
    """

    summary = "static places merged over time, attention elsewhere (HoliTom 2505.21334)"
    traits = Traits(merges=True, grid="whole", batched=True)
    needs = frozenset({TOWER_ATTENTION})

    def reduce(self, tokens: Tokens) -> Kept:
        x, attention = salient(tokens, "holitom")
        static: Groups = []
        moving: Groups = []
        spans = zip(place_cosines(tokens, x), tokens.budgets, tokens.starts, strict=True)
        for cosines, budget, start in spans:
            # Static rows of every window and moving rows of every frame share the budget.
            windows = static_windows(cosines, budget, TAU)
            groups = [window.static + start for window in windows]
            groups += [frame + start for window in windows for frame in window.moving]
            lengths = [len(group) for group in groups]
            shares = [*zip(groups, frame_budgets(lengths, budget, lengths), strict=True)]
            static += [(group, k) for group, k in shares[: len(windows)] if k]
            moving += [(group, k) for group, k in shares[len(windows) :] if k]
        # Moving rows: the largest attention.
        rows = tokens.table(np.concatenate([np.arange(0), *(group for group, _ in moving)]))
        if moving:
            lengths = [len(group) for group, _ in moving]
            rows = rows[best_rows(attention[rows], [k for _, k in moving], lengths)]
        if not static:
            return with_merged(x, rows, None)
        # Static rows: means over the window, merged around density peaks, in its first frame.
        values = run_means(tokens, x, [group for group, _ in static])
        counts = [k for _, k in static]
        centres, merged, sizes = peaks(values, [len(group) for group, _ in static], counts)
        at = tokens.table(np.concatenate([group[:, 0] for group, _ in static]))[centres]
        frames = tokens.table([group.shape[1] for group, k in static for _ in range(k)])
        return with_merged(x, rows, (at, merged, sizes * frames))


def peaks(x: Tensor, lengths: list[int], clusters: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Density peaks of sets x (n, d), their values mixed with their cluster, and cluster sizes."""
    neighbours = [min(NEIGHBOURS, count) for count in clusters]
    centres, labels = density_peaks(x, lengths, clusters, neighbours, x.shape[1] ** 0.5)
    counts = cluster_sizes(labels, len(centres))[:, None]
    others = (cluster_sums(x, labels, len(centres)) - x[centres]) / (counts - 1).clamp(min=1)
    mixed = BETA * x[centres] + (1 - BETA) * others
    return centres, torch.where(counts > 1, mixed, x[centres]), counts[:, 0].float()
