"""Comparator: clusters of the salient tokens, by look and place."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from tokencomp.plan.counts import frame_budgets
from tokencomp.reducers._batch import best_rows, salient
from tokencomp.reducers._clusters import cluster_sums, density_peaks
from tokencomp.reducers._segments import place_cosines, run_means, still_windows
from tokencomp.reducers.registry import register_reducer
from tokencomp.reducers.score import PatchReducer
from tokencomp.tokens.patches import Patches
from tokencomp.tokens.reduction import Reduction
from tokencomp.tokens.signals import TOWER_ATTENTION
from tokencomp.tokens.stacks import HostIndex

STATIC, CANDIDATES, NEIGHBOURS = 0.8, 1.5, 7
TIME, PLACE = 1e4, 1e3  # bases of the rotations


@register_reducer("tango")
@dataclass(frozen=True)
class Tango(PatchReducer):
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

    def reduce_patches(self, patches: Patches) -> Reduction:
        x, attention = salient(patches, "tango")
        groups, counts, places = list[HostIndex](), list[int](), list[HostIndex]()
        likes = place_cosines(patches, x)
        for number, (like, budget) in enumerate(zip(likes, patches.budgets, strict=True)):
            (_, h, w), start = patches.batch.grids[number], patches.starts[number]
            windows = still_windows(like, budget, STATIC)
            own = [group for still, moving in windows for group in (still, *moving[:, :, None])]
            lengths = [len(group) for group in own]
            for group, count in zip(own, frame_budgets(lengths, budget, lengths), strict=True):
                if count:
                    at = group[:, 0]
                    groups.append(group + start)
                    counts.append(count)
                    places.append(np.stack([at // (h * w), at // w % h, at % w], 1))
        values = run_means(patches, x, groups)
        saliency = run_means(patches, attention[:, None], groups)[:, 0]
        y = rotated(values, patches.table(np.concatenate(places)))
        chosen = representatives(y, saliency, [*map(len, groups)], counts)
        at = patches.table(np.concatenate([group[:, 0] for group in groups]))
        frames = patches.table([group.shape[1] for group in groups for _ in group])
        return patches.replaced(at[chosen], values[chosen], frames[chosen].float())


def representatives(y: Tensor, saliency: Tensor, lengths: list[int], counts: list[int]) -> Tensor:
    """`counts` rows of every group of y (n, d): the most salient of each cluster of candidates."""
    most = [min(n, int(CANDIDATES * count)) for n, count in zip(lengths, counts, strict=True)]
    candidates = best_rows(saliency, most, lengths)
    neighbours = [NEIGHBOURS] * len(counts)
    _, labels = density_peaks(y[candidates], most, counts, neighbours, itself=False)
    order = saliency[candidates].sort(descending=True, stable=True).indices
    # A stable sort by cluster leaves the most salient of each in front.
    by_cluster = order[labels[order].sort(stable=True).indices]
    sizes = cluster_sums(torch.ones_like(labels), labels, sum(counts))
    chosen: Tensor = candidates[by_cluster[sizes.cumsum(0) - sizes]]
    return chosen


def rotated(x: Tensor, places: Tensor) -> Tensor:
    """Unit rows of x (n, d), whose thirds of the channels are rotated by time, row and column.

    `places` (n, 3) are these three numbers.
    """
    unit = normalize(x, dim=1)
    third = x.shape[1] // 6 * 2
    parts = list(unit.split([third, third, x.shape[1] - 2 * third], dim=1))
    for axis, (base, place) in enumerate(zip((TIME, PLACE, PLACE), places.unbind(1), strict=True)):
        half = parts[axis].shape[1] // 2
        steps = torch.arange(half, device=x.device, dtype=torch.float32) / max(half, 1)
        angle = place[:, None] * base**-steps
        a, b, odd = parts[axis].split([half, half, parts[axis].shape[1] - 2 * half], dim=1)
        cos, sin = angle.cos(), angle.sin()
        parts[axis] = torch.cat([a * cos - b * sin, b * cos + a * sin, odd], dim=1)
    return torch.cat(parts, dim=1)
