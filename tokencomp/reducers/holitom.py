"""Comparator: places that stand still are merged over time."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tokencomp.plan.counts import frame_budgets
from tokencomp.plan.reducer import Traits
from tokencomp.reducers._batch import best_rows, salient, with_merged
from tokencomp.reducers._clusters import cluster_sums, density_peaks
from tokencomp.reducers._segments import place_cosines, run_means, still_windows
from tokencomp.reducers.base import Reducer
from tokencomp.reducers.registry import register_reducer
from tokencomp.tokens.kept import Kept
from tokencomp.tokens.signals import TOWER_ATTENTION
from tokencomp.tokens.stacks import HostIndex
from tokencomp.tokens.tokens import Tokens

STATIC, NEIGHBOURS, OWN = 0.8, 7, 0.6


@register_reducer("holitom")
@dataclass(frozen=True)
class HoliTom(Reducer):
    """Merge what stands still along time, and keep of the rest what the vision tower attends to.

    HoliTom (arXiv 2505.21334), the part before the decoder. The video is cut into windows so that
    static places (cosine with the same place of the next frame above 0.8, in all frames of a
    window) save most rows. They become their mean over the window, in its first frame; of these
    means the density peaks stay, each as 0.6 · itself + 0.4 · the mean of the others of its
    cluster. Of the other places of every frame those with the largest attention in the tower stay.

    Notes
    -----
    Static and other rows share the budget in proportion to their number, by largest remainders (the
    release rounds every part). Where static means would leave fewer rows than asked for, only the
    most alike places are static (ours). The release has contextual tokens among the moving ones as
    well, but its scripts turn them off; it puts static rows before the others and numbers positions
    anew, and takes a threshold of 0.65 at 10 %. Merging inside of the decoder is left out. A video
    that moves everywhere, and an image, is attention alone.
    """

    summary = "still places merged over time, attention elsewhere (HoliTom 2505.21334)"
    traits = Traits(merges=True, grid="whole", batched=True)
    needs = frozenset({TOWER_ATTENTION})

    def reduce(self, tokens: Tokens) -> Kept:
        x, attention = salient(tokens, "holitom")
        still: list[tuple[HostIndex, int]] = []
        moving: list[tuple[HostIndex, int]] = []
        likes = place_cosines(tokens, x)
        for like, budget, start in zip(likes, tokens.budgets, tokens.starts, strict=True):
            windows = still_windows(like, budget, STATIC)
            static = [window.static + start for window in windows]
            frames = [frame + start for window in windows for frame in window.moving]
            lengths = [len(group) for group in (*static, *frames)]
            budgets = frame_budgets(lengths, budget, lengths)
            still += [(own, k) for own, k in zip(static, budgets, strict=False) if k]
            # Frames that are static as a whole have no rows to choose from.
            moving += [(own, k) for own, k in zip(frames, budgets[len(static) :], strict=True) if k]
        rows = tokens.table(np.concatenate([np.arange(0), *(own for own, _ in moving)]))
        if moving:
            lengths = [len(own) for own, _ in moving]
            counts = [count for _, count in moving]
            rows = rows[best_rows(attention[rows], counts, lengths)]
        if not still:
            return with_merged(x, rows, None)
        values = run_means(tokens, x, [own for own, _ in still])
        places, merged, sizes = peaks(values, [len(own) for own, _ in still], [k for _, k in still])
        at = tokens.table(np.concatenate([own[:, 0] for own, _ in still]))[places]
        repeats = tokens.table([own.shape[1] for own, k in still for _ in range(k)])
        return with_merged(x, rows, (at, merged, sizes * repeats))


def peaks(x: Tensor, lengths: list[int], clusters: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Centres of clusters of sets x (n, d), their mean with what belongs to them, their sizes."""
    neighbours = [min(NEIGHBOURS, count) for count in clusters]
    centres, labels = density_peaks(x, lengths, clusters, neighbours, x.shape[1] ** 0.5)
    counts = cluster_sums(torch.ones_like(labels), labels, len(centres))[:, None]
    others = (cluster_sums(x, labels, len(centres)) - x[centres]) / (counts - 1).clamp(min=1)
    mixed = OWN * x[centres] + (1 - OWN) * others
    return centres, torch.where(counts > 1, mixed, x[centres]), counts[:, 0].float()
