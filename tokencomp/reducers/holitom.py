"""Comparator: places that stand still are merged over time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokencomp.plan.counts import frame_budgets
from tokencomp.reducers._clusters import cluster_sums, distances, dpc_knn
from tokencomp.reducers._rows import replace_patches, salient_rows
from tokencomp.reducers._segments import still_windows
from tokencomp.reducers.base import Reducer
from tokencomp.reducers.registry import register_reducer
from tokencomp.tokens.reduction import Reduction
from tokencomp.tokens.signals import TOWER_ATTENTION
from tokencomp.tokens.spans import VisualTokens

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
    merges = True
    grid = "whole"
    needs = frozenset({TOWER_ATTENTION})

    def reduce(self, tokens: VisualTokens, keep: int) -> Reduction:
        from tokencomp.kernels import topk_stable

        rows, budget, x, attention = salient_rows(tokens, keep, "holitom", whole=True)
        t, n = tokens.grid[0], len(rows) // tokens.grid[0]
        frames, windows = x.view(t, n, -1), still_windows(x.view(t, n, -1), budget, STATIC)
        moving = torch.cat([~window.static.expand(window.length, n) for window in windows])
        still = torch.stack([window.static for window in windows]).sum(1).tolist()
        lengths = [*still, *moving.sum(1).tolist()]
        budgets = frame_budgets(lengths, budget, lengths)
        scores = attention.masked_fill(~moving.flatten(), -torch.inf)
        chosen = topk_stable(scores, budgets[len(still) :], spans=[n] * t)
        kept = [(chosen, x[chosen], x.new_ones(len(chosen)))]
        for window, count in zip(windows, budgets, strict=False):
            if count:
                own = window.static.nonzero()[:, 0]
                means = frames[window.first : window.first + window.length, own].mean(0)
                centres, value, sizes = peaks(means, count)
                kept.append((window.first * n + own[centres], value, sizes * window.length))
        at, values, sizes = (torch.cat(column) for column in zip(*kept, strict=True))
        return replace_patches(tokens, rows[at], values, sizes)


def peaks(x: Tensor, clusters: int) -> tuple[Tensor, Tensor, Tensor]:
    """Centres of clusters of x (n, d), their mean with what belongs to them, and their sizes."""
    distance = distances(x) / x.shape[1] ** 0.5
    centres, labels = dpc_knn(distance, clusters, min(NEIGHBOURS, clusters))
    counts = torch.bincount(labels, minlength=clusters)[:, None]
    others = (cluster_sums(x, labels, clusters) - x[centres]) / (counts - 1).clamp(min=1)
    mixed = OWN * x[centres] + (1 - OWN) * others
    return centres, torch.where(counts > 1, mixed, x[centres]), counts[:, 0].float()
