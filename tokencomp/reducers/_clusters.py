"""Clusters around density peaks, which several methods for video merge into."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tokencomp.reducers._batch import best_rows
from tokencomp.tokens.stacks import HostIndex, Stack, masked, portions, rows_of, starts_of

ENTRIES = 1 << 23  # entries of a table of padded sets that are in memory at once


def density_peaks(
    x: Tensor,
    lengths: Sequence[int],
    clusters: Sequence[int],
    neighbours: Sequence[int],
    scale: float = 1.0,
    itself: bool = True,
) -> tuple[Tensor, Tensor]:
    """Density peaks with k nearest neighbours of sets of rows: centres, and the cluster of a row.

    The density of a row is ρ = exp(-mean of its k smallest squared distances), and its separation δ
    the distance to the nearest row of higher density, or the largest distance of its set for the
    densest one. Centres have the largest ρ·δ. Every row belongs to the nearest centre. Releases add
    noise to break ties; here the lower row counts as denser, and ties of all else go to the lower
    row, so that the result does not change.

    Parameters
    ----------
    x : Tensor, shape (n, d)
        Rows of all sets, one set after the other.
    lengths, clusters, neighbours
        Of every set its rows (at least 1), centres (1 … rows) and k, at most as many as there are.
    scale
        Distances are Euclidean, divided by this.
    itself
        Whether the row itself (distance 0) is one of the k.

    Returns
    -------
    centres : Tensor of int64, shape (Σ clusters,)
        Rows of x, ascending.
    labels : Tensor of int64, shape (n,)
        Numbers of centres.
    """
    n, count, k = (np.asarray(values) for values in (lengths, clusters, neighbours))
    starts, firsts = starts_of(n), starts_of(count)
    centres = torch.empty(int(firsts[-1]), dtype=torch.int64, device=x.device)
    labels = torch.empty(len(x), dtype=torch.int64, device=x.device)
    for sets in portions(n**2, ENTRIES):
        stack = Stack(starts[sets], n[sets], x.device)
        chosen, label = _peaks(stack, stack.of(x).float(), count[sets], k[sets], scale, itself)
        rows = stack.flat(stack.rows)
        numbers = torch.from_numpy(rows_of(firsts, sets)).to(x.device)
        centres[numbers], labels[rows] = rows[chosen], numbers[label]
    return centres, labels


def _peaks(
    stack: Stack, x: Tensor, clusters: HostIndex, k: HostIndex, scale: float, itself: bool
) -> tuple[Tensor, Tensor]:
    """`density_peaks` of a table x (sets, longest, d); rows are counted without repeated ones."""

    def table(values: HostIndex) -> Tensor:
        return torch.from_numpy(values).to(x.device)

    n, row = stack.lengths, torch.arange(stack.longest, device=x.device)
    distance = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist") / scale
    others = masked(distance.clone(), n, torch.inf)
    if not itself:
        others.diagonal(dim1=1, dim2=2).fill_(torch.inf)
    k = np.minimum(k, np.maximum(n - (not itself), 1))
    near = others.topk(int(k.max()), dim=2, largest=False).values.square()
    mean = masked(near, k, 0).sum(2) / table(k[:, None])
    density = masked(mean.neg().exp(), n, -1)
    equal = (density[:, None] == density[:, :, None]) & (row < row[:, None])
    denser = (density[:, None] > density[:, :, None]) | equal
    most = distance.amax((1, 2), keepdim=True)
    scores = stack.flat(density * torch.where(denser, distance, most).amin(2))
    centres = best_rows(scores, clusters.tolist(), n.tolist())
    starts, firsts = starts_of(n)[:-1], starts_of(clusters)[:-1]
    in_set = Stack(firsts, clusters, x.device).of(centres) - table(starts[:, None])
    nearest = distance.gather(2, in_set[:, None].expand(-1, len(row), -1)).argmin(2)
    labels = stack.flat(nearest + table(firsts[:, None]))
    labels[centres] = torch.arange(len(centres), device=x.device)
    return centres, labels


def cluster_sums(x: Tensor, labels: Tensor, clusters: int) -> Tensor:
    """Sum of the rows of every cluster, shape (clusters, …)."""
    return x.new_zeros(clusters, *x.shape[1:]).index_add_(0, labels, x)
