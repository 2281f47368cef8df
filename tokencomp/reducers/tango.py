"""Tango: clusters of salient tokens and of the others (arXiv 2604.09547)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from tokencomp.plan.counts import frame_budgets
from tokencomp.reducers import Kept, Reducer, Tokens, Traits, best_rows, register_reducer
from tokencomp.reducers._batch import complement
from tokencomp.reducers._clusters import cluster_sizes, cluster_sums, density_peaks
from tokencomp.reducers._segments import Window, place_cosines, run_means, static_windows
from tokencomp.reducers.base import salient
from tokencomp.tokens.signals import TOWER_ATTENTION
from tokencomp.tokens.stacks import HostIndex, rows_of, starts_of
from tokencomp.validation import between

TAU, CANDIDATES, NEIGHBOURS, BETA = 0.8, 1.5, 7, 0.6
TIME, PLACE = 1e4, 1e3  # bases of the rotations


@register_reducer("tango")
@dataclass(frozen=True)
class Tango(Reducer):
    """One token of every cluster of salient tokens, and means of clusters of the others.

    Tango (arXiv 2604.09547). Windows and static places as in `holitom` (τ = 0.8); static places
    become their mean over the window. Of a frame's moving rows, or a window's static rows, with
    budget B:

        S          = ⌊(1 - context) · B⌋ salient tokens
        candidates = the ⌊1.5 · S⌋ rows of largest attention in the tower
        salient    : of each of S clusters (DPC-KNN) of the candidates, the row of largest attention
        context    : clusters of the other rows, of all moving or static rows of a window,
                     x_c ← ω · x_c + (1 - ω) · mean of the cluster,  ω = max(1 / size, 0.6)

    What is compared are unit features whose channels are rotated by time, row and column, a third
    each; static places have the time of their first frame.

    Deviations from the release:

    - Windows get shares of the budget by their frames, and within a window static places and frames
      by their number of rows; largest remainders make the sum exact. The release rounds up each
      part.
    - Time is the index of the frame; there it is in seconds.
    - A cluster's mean has the position of its centre; the release swaps these between clusters.
    - τ is 0.8 at every ratio; its scripts use 0.65 at 10 %.
    - Attention is the last block's; for LLaVA it reads SigLIP's pooling head, which Hugging
      Face does not load.

    Attributes
    ----------
    context : float
        Share of the budget for clusters of the other tokens; 0: they are dropped.
    """

    context: float = field(default=0.4, metadata=between(0, 1))

    summary = "clusters of salient tokens by look, time and place (Tango 2604.09547)"
    traits = Traits(merges=True, grid="whole", batched=True)
    needs = frozenset({TOWER_ATTENTION})

    def reduce(self, tokens: Tokens) -> Kept:
        x, attention = salient(tokens, "tango")
        groups, counts, pools = list[HostIndex](), list[int](), list[int]()
        spans = zip(place_cosines(tokens, x), tokens.budgets, tokens.starts, strict=True)
        for cosines, budget, start in spans:
            for pool in budgeted(static_windows(cosines, budget, TAU), budget):
                groups += [group + start for group, _ in pool]
                counts += [count for _, count in pool]
                pools.append(len(pool))
        values = run_means(tokens, x, groups)
        saliency = run_means(tokens, attention[:, None], groups)[:, 0]
        at = tokens.table(np.concatenate([group[:, 0] for group in groups]))
        frames = tokens.table([group.shape[1] for group in groups for _ in group]).float()
        y = rotated(x.index_select(0, at), places(tokens, at))
        # The salient rows of every group.
        n_salient = [int(count * (1 - self.context) + 1e-9) for count in counts]
        lengths = [len(group) for group in groups]
        chosen = representatives(y, saliency, lengths, n_salient)
        # Clusters of the other rows, over all groups of a pool.
        others = [n - k for n, k in zip(lengths, n_salient, strict=True)]
        n_context = [count - k for count, k in zip(counts, n_salient, strict=True)]
        ends = [0, *accumulate(pools)]
        sizes, clusters = ([sum(n[a:b]) for a, b in pairwise(ends)] for n in (others, n_context))
        rest = complement(chosen, len(y))
        centres, merged, weights = means_of(values, y, frames, rest, sizes, clusters)
        kept = at[torch.cat([chosen, centres])]
        weights = torch.cat([frames[chosen], weights])
        return Kept.ascending(kept, torch.cat([values[chosen], merged]), weights)


def budgeted(windows: list[Window], budget: int) -> Iterator[list[tuple[HostIndex, int]]]:
    """Groups of patches (places, frames) of every window, each with its budget.

    The static group of a window is yielded as one list, its moving groups (one per frame) as
    another, and neither if it has no patches.
    """
    parts = [(window.static, *window.moving[:, :, None]) for window in windows]
    rooms = [sum(map(len, groups)) for groups in parts]
    frames = [len(window.moving) for window in windows]
    for groups, share in zip(parts, frame_budgets(frames, budget, rooms), strict=True):
        lengths = [len(group) for group in groups]
        shares = [*zip(groups, frame_budgets(lengths, share, lengths), strict=True)]
        yield from (pool for pool in (shares[:1], shares[1:]) if len(pool[0][0]))


def places(tokens: Tokens, rows: Tensor) -> Tensor:
    """Time, row and column (n, 3) of patches of whole grids."""
    grids = tokens.table(tokens.grids)[tokens.owners()[rows]]
    cell, h, w = tokens.cells()[rows], grids[:, 1], grids[:, 2]
    return torch.stack([cell // (h * w), cell // w % h, cell % w], 1)


def representatives(y: Tensor, saliency: Tensor, lengths: list[int], counts: list[int]) -> Tensor:
    """`counts` rows of every group of y (n, d): the most salient of each cluster of candidates."""
    rows, lengths, counts = nonempty(lengths, counts, y.device)
    if not counts:
        return rows
    most = [min(n, int(CANDIDATES * count)) for n, count in zip(lengths, counts, strict=True)]
    candidates = rows[best_rows(saliency[rows], most, lengths)]
    neighbours = [NEIGHBOURS] * len(counts)
    _, labels = density_peaks(y[candidates], most, counts, neighbours, itself=False)
    order = saliency[candidates].sort(descending=True, stable=True).indices
    # After a stable sort by cluster, the most salient of each comes first.
    by_cluster = order[labels[order].sort(stable=True).indices]
    sizes = cluster_sizes(labels, sum(counts))
    chosen: Tensor = candidates[by_cluster[sizes.cumsum(0) - sizes]]
    return chosen


def nonempty(
    lengths: list[int], counts: list[int], device: torch.device
) -> tuple[Tensor, list[int], list[int]]:
    """Rows, lengths and counts of the groups with a count above 0."""
    some = np.flatnonzero(counts)
    host = rows_of(starts_of(lengths), some) if len(some) else np.arange(0)
    rows = torch.from_numpy(host).to(device)
    return rows, [lengths[i] for i in some], [counts[i] for i in some]


def means_of(
    values: Tensor, y: Tensor, frames: Tensor, rest: Tensor, lengths: list[int], counts: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """`counts` clusters of every set of the rows `rest`: centres, their new features and
    weights.
    """
    rows, lengths, counts = nonempty(lengths, counts, y.device)
    if not counts:
        return rest[:0], values[:0], frames[:0]
    rows, neighbours = rest[rows], [NEIGHBOURS] * len(counts)
    centres, labels = density_peaks(y[rows], lengths, counts, neighbours, itself=False)
    members = cluster_sizes(labels, len(centres))[:, None].float()
    mean = cluster_sums(values[rows], labels, len(centres)) / members
    omega = (1 / members).clamp(min=BETA)
    mixed = omega * values[rows[centres]] + (1 - omega) * mean
    return rows[centres], mixed, cluster_sums(frames[rows], labels, len(centres))


def rotated(x: Tensor, places: Tensor) -> Tensor:
    """Unit rows of x (n, d) with a third of the channels each rotated by time, row and column
    (n, 3).
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
