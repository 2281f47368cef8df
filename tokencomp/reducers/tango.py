"""Comparator: clusters of the salient tokens, by look and place, and of the others."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from tokencomp.plan.counts import frame_budgets
from tokencomp.plan.reducer import Traits
from tokencomp.reducers._batch import best_rows, salient
from tokencomp.reducers._clusters import cluster_sums, density_peaks
from tokencomp.reducers._segments import StillWindow, place_cosines, run_means, still_windows
from tokencomp.reducers.base import Reducer
from tokencomp.reducers.registry import register_reducer
from tokencomp.tokens.kept import Kept
from tokencomp.tokens.signals import TOWER_ATTENTION
from tokencomp.tokens.stacks import HostIndex, rows_of, starts_of
from tokencomp.tokens.tokens import Tokens, rows_where
from tokencomp.validation import check_range

STATIC, CANDIDATES, NEIGHBOURS, CENTRE = 0.8, 1.5, 7, 0.6
TIME, PLACE = 1e4, 1e3  # bases of the rotations


@register_reducer("tango")
@dataclass(frozen=True)
class Tango(Reducer):
    """One token of every cluster of what the vision tower attends to, and means of the others.

    Tango (arXiv 2604.09547). Places that stand still in a window (as in `holitom`, threshold 0.8)
    become their mean over its frames. Of S salient tokens of a frame, or of a window's static
    places, the ⌊1.5 · S⌋ with the largest attention in the tower are candidates. They fall into S
    clusters around density peaks, and the one with the largest attention of each stays. The other
    tokens of a window's moving places, and of its static ones, fall into clusters as well, each of
    which becomes 0.6 · its centre + 0.4 · its mean (or more of the centre, in clusters of one).
    What is compared are unit features whose channels are rotated by time, row and column, a third
    each; of static places those of the first frame.

    Attributes
    ----------
    context : float
        Share of the budget for the clusters of the others; 0: they are dropped.

    Notes
    -----
    Every window gets its share of the budget by its frames, and in it static places and frames
    theirs by their number of rows. The release rounds up each part; here largest remainders give
    the exact sum, and what a window cannot hold the others get. Frames are numbered, where the
    release takes seconds. The release writes the means of clusters to each other's places; here
    each has the place of its centre. At 10 % its scripts cut windows at a threshold of 0.65. The
    attention is that of the last block, for LLaVA that of SigLIP's pooling head in the release,
    which Hugging Face does not load.
    """

    context: float = 0.4

    summary = "clusters of salient tokens by look, time and place (Tango 2604.09547)"
    traits = Traits(merges=True, grid="whole", batched=True)
    needs = frozenset({TOWER_ATTENTION})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self.name, "context", self.context, 0, 1)

    def reduce(self, tokens: Tokens) -> Kept:
        x, attention = salient(tokens, "tango")
        groups, counts, pools = list[HostIndex](), list[int](), list[int]()
        likes = place_cosines(tokens, x)
        for like, budget, start in zip(likes, tokens.budgets, tokens.starts, strict=True):
            for own in budgeted(still_windows(like, budget, STATIC), budget):
                groups += [group + start for group, _ in own]
                counts += [count for _, count in own]
                pools.append(len(own))
        values = run_means(tokens, x, groups)
        saliency = run_means(tokens, attention[:, None], groups)[:, 0]
        at = tokens.table(np.concatenate([group[:, 0] for group in groups]))
        frames = tokens.table([group.shape[1] for group in groups for _ in group]).float()
        y = rotated(x.index_select(0, at), places(tokens, at))
        few = [int(count * (1 - self.context) + 1e-9) for count in counts]
        lengths = [len(group) for group in groups]
        chosen = representatives(y, saliency, lengths, few)
        left = torch.ones(len(y), dtype=torch.bool, device=y.device)
        left[chosen] = False
        others = [n - k for n, k in zip(lengths, few, strict=True)]
        more = [count - k for count, k in zip(counts, few, strict=True)]
        ends = [0, *accumulate(pools)]
        sizes, clusters = ([sum(n[a:b]) for a, b in pairwise(ends)] for n in (others, more))
        rest = rows_where(left, sum(others))
        centres, merged, stand_for = means_of(values, y, frames, rest, sizes, clusters)
        kept = torch.cat([chosen, centres])
        stand_for = torch.cat([frames[chosen], stand_for])
        return Kept.ascending(at[kept], torch.cat([values[chosen], merged]), stand_for)


def budgeted(windows: list[StillWindow], budget: int) -> Iterator[list[tuple[HostIndex, int]]]:
    """Static places, and moving ones of each frame, of every window, and how many of them stay.

    A group is numbers of patches (places, frames). The static group of a window and its moving
    ones, which have as many rows each, are yielded apart, and not at all without rows.
    """
    parts = [(window.static, *window.moving[:, :, None]) for window in windows]
    rooms = [sum(map(len, groups)) for groups in parts]
    frames = [len(window.moving) for window in windows]
    for groups, share in zip(parts, frame_budgets(frames, budget, rooms), strict=True):
        lengths = [len(group) for group in groups]
        own = [*zip(groups, frame_budgets(lengths, share, lengths), strict=True)]
        yield from (pool for pool in (own[:1], own[1:]) if len(pool[0][0]))


def places(tokens: Tokens, rows: Tensor) -> Tensor:
    """Time, row and column (n, 3) of patches of whole grids."""
    grids = tokens.table(tokens.grids)[tokens.owners()[rows]]
    cell, h, w = tokens.cells()[rows], grids[:, 1], grids[:, 2]
    return torch.stack([cell // (h * w), cell // w % h, cell % w], 1)


def representatives(y: Tensor, saliency: Tensor, lengths: list[int], counts: list[int]) -> Tensor:
    """`counts` rows of every group of y (n, d): the most salient of each cluster of candidates."""
    some = [number for number, count in enumerate(counts) if count]
    if not some:
        return torch.zeros(0, dtype=torch.int64, device=y.device)
    rows = torch.from_numpy(rows_of(starts_of(lengths), some)).to(y.device)
    lengths, counts = [lengths[i] for i in some], [counts[i] for i in some]
    most = [min(n, int(CANDIDATES * count)) for n, count in zip(lengths, counts, strict=True)]
    candidates = rows[best_rows(saliency[rows], most, lengths)]
    neighbours = [NEIGHBOURS] * len(counts)
    _, labels = density_peaks(y[candidates], most, counts, neighbours, itself=False)
    order = saliency[candidates].sort(descending=True, stable=True).indices
    # A stable sort by cluster leaves the most salient of each in front.
    by_cluster = order[labels[order].sort(stable=True).indices]
    sizes = cluster_sums(torch.ones_like(labels), labels, sum(counts))
    chosen: Tensor = candidates[by_cluster[sizes.cumsum(0) - sizes]]
    return chosen


def means_of(
    values: Tensor, y: Tensor, frames: Tensor, rest: Tensor, lengths: list[int], counts: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """`counts` clusters of every set of the rows `rest`: centres, their new values, their sizes."""
    some = [number for number, count in enumerate(counts) if count]
    if not some:
        return rest[:0], values[:0], frames[:0]
    rows = rest[torch.from_numpy(rows_of(starts_of(lengths), some)).to(y.device)]
    lengths, counts = [lengths[i] for i in some], [counts[i] for i in some]
    neighbours = [NEIGHBOURS] * len(counts)
    centres, labels = density_peaks(y[rows], lengths, counts, neighbours, itself=False)
    members = cluster_sums(torch.ones_like(labels), labels, len(centres))[:, None].float()
    mean = cluster_sums(values[rows], labels, len(centres)) / members
    share = (1 / members).clamp(min=CENTRE)
    mixed = share * values[rows[centres]] + (1 - share) * mean
    return rows[centres], mixed, cluster_sums(frames[rows], labels, len(centres))


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
