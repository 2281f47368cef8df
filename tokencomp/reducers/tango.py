"""Comparator: clusters of the salient tokens, by look and place."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from tokencomp.plan.counts import frame_budgets
from tokencomp.reducers._clusters import distances, dpc_knn
from tokencomp.reducers._rows import replace_patches, salient_rows
from tokencomp.reducers._segments import still_windows
from tokencomp.reducers.base import Reducer
from tokencomp.reducers.registry import register_reducer
from tokencomp.tokens.reduction import Reduction
from tokencomp.tokens.signals import TOWER_ATTENTION
from tokencomp.tokens.spans import Grid, VisualTokens

STATIC, CANDIDATES, NEIGHBOURS = 0.8, 1.5, 7
TIME, PLACE = 1e4, 1e3  # bases of the rotations


@register_reducer("tango")
@dataclass(frozen=True)
class Tango(Reducer):
    """One token of every cluster of what the vision tower attends to, apart in time and place.

    Tango (arXiv 2604.09547). Places that stand still in a window (as in `holitom`, threshold 0.8)
    become their mean over its frames. Of S tokens of a frame, or of a window's static places, the
    ⌊1.5 · S⌋ with the largest attention in the tower are candidates. They fall into S clusters
    around density peaks, and the one with the largest attention of each stays. What is compared are
    unit features whose channels are rotated by time, row and column, a third each.

    Notes
    -----
    This is the form for Qwen, without context tokens (the release merges 40 % for LLaVA). Static
    and other rows share the budget by largest remainders, where the release rounds up. Frames are
    numbered, where the release takes seconds. The attention is that of the last block, for LLaVA
    that of SigLIP's pooling head in the release, which Hugging Face does not load.
    """

    summary = "clusters of salient tokens by look, time and place (Tango 2604.09547)"
    merges = True
    grid = "whole"
    needs = frozenset({TOWER_ATTENTION})

    def reduce(self, tokens: VisualTokens, keep: int) -> Reduction:
        rows, budget, x, attention = salient_rows(tokens, keep, "tango", whole=True)
        t, n = tokens.grid[0], len(rows) // tokens.grid[0]
        x, attention = x.view(t, n, -1), attention.view(t, n)
        groups = []
        for window in still_windows(x, budget, STATIC):
            frames = slice(window.first, window.first + window.length)
            own = window.static.nonzero()[:, 0]
            if len(own):
                means = x[frames, own].mean(0), attention[frames, own].mean(0)
                groups.append((window.first * n + own, *means, window.length))
            own = (~window.static).nonzero()[:, 0]
            for f in range(frames.start, frames.stop) if len(own) else ():
                groups.append((f * n + own, x[f, own], attention[f, own], 1))
        lengths = [len(group[0]) for group in groups]
        places, values, sizes = [], [], []
        for (at, value, saliency, size), count in zip(
            groups, frame_budgets(lengths, budget, lengths), strict=True
        ):
            chosen = representatives(rotated(value, at, tokens.grid), saliency, count)
            places.append(at[chosen])
            values.append(value[chosen])
            sizes.append(x.new_full((count,), size))
        at, merged = rows[torch.cat(places)], torch.cat(values)
        return replace_patches(tokens, at, merged, torch.cat(sizes))


def representatives(y: Tensor, saliency: Tensor, count: int) -> Tensor:
    """`count` rows of y (n, d), ascending: the most salient of every cluster of the candidates."""
    from tokencomp.kernels import topk_stable

    if count == 0:
        return torch.empty(0, dtype=torch.int64, device=y.device)
    candidates = topk_stable(saliency, min(len(y), int(CANDIDATES * count)))
    _, labels = dpc_knn(distances(y[candidates]), count, NEIGHBOURS, itself=False)
    order = saliency[candidates].sort(descending=True, stable=True).indices
    # A stable sort by cluster leaves the most salient of each in front.
    by_cluster = order[labels[order].sort(stable=True).indices]
    counts = torch.bincount(labels, minlength=count)
    chosen: Tensor = candidates[by_cluster[counts.cumsum(0) - counts]]
    return chosen.sort().values


def rotated(x: Tensor, places: Tensor, grid: Grid) -> Tensor:
    """Unit rows of x (n, d), whose thirds of the channels are rotated by time, row and column."""
    _, h, w = grid
    at = (places // (h * w), places // w % h, places % w)
    unit = normalize(x, dim=1)
    third = x.shape[1] // 6 * 2
    parts = list(unit.split([third, third, x.shape[1] - 2 * third], dim=1))
    for axis, (base, place) in enumerate(zip((TIME, PLACE, PLACE), at, strict=True)):
        half = parts[axis].shape[1] // 2
        steps = torch.arange(half, device=x.device, dtype=torch.float32) / max(half, 1)
        angle = place[:, None] * base**-steps
        a, b, odd = parts[axis].split([half, half, parts[axis].shape[1] - 2 * half], dim=1)
        cos, sin = angle.cos(), angle.sin()
        parts[axis] = torch.cat([a * cos - b * sin, b * cos + a * sin, odd], dim=1)
    return torch.cat(parts, dim=1)
