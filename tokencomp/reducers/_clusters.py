"""Density-peak clustering with k nearest neighbours (DPC-KNN), for methods that merge tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tokencomp.reducers.base import best_rows
from tokencomp.tokens.stacks import HostIndex, Stack, masked, portions, rows_of, starts_of

ENTRIES = 1 << 23  # distances in memory at once


def density_peaks(
    x: Tensor,
    lengths: Sequence[int],
    clusters: Sequence[int],
    neighbours: Sequence[int],
    scale: float = 1.0,
    itself: bool = True,
) -> tuple[Tensor, Tensor]:
    """DPC-KNN of sets of rows: cluster centres, and the cluster of every row.

        ρ_i = exp(-mean over the k nearest j of d(x_i, x_j)²)
        δ_i = min over j with ρ_j > ρ_i of d(x_i, x_j);  for the densest row the largest distance

    Centres have the largest ρ·δ, and every row belongs to the nearest centre. d is the Euclidean
    distance over `scale`, and `itself` says whether a row (d = 0) is one of its k neighbours.
    Releases add noise to break ties; here they go to the lower row, which also counts as denser.

    x (n, d) holds the sets one after the other; `lengths`, `clusters` and `neighbours` are per set
    its rows (at least 1), its centres (1 … rows) and k. Returns the centres as ascending rows of x,
    int64 (Σ clusters,), and for every row the index of its centre among these, int64 (n,).
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
    """`density_peaks` of a padded table x (sets, longest, d), whose padding does not count."""
    n, row, table = stack.lengths, torch.arange(stack.longest, device=x.device), stack.table
    distance = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist") / scale
    # ρ: from the k nearest neighbours.
    others = masked(distance.clone(), n, torch.inf)
    if not itself:
        others.diagonal(dim1=1, dim2=2).fill_(torch.inf)
    k = np.minimum(k, np.maximum(n - (not itself), 1))
    near = others.topk(int(k.max()), dim=2, largest=False).values.square()
    mean = masked(near, k, 0).sum(2) / table(k[:, None])
    rho = masked(mean.neg().exp(), n, -1)
    # δ: the distance to the nearest denser row; of equal densities the lower row is denser.
    equal = (rho[:, None] == rho[:, :, None]) & (row < row[:, None])
    denser = (rho[:, None] > rho[:, :, None]) | equal
    most = distance.amax((1, 2), keepdim=True)
    delta = torch.where(denser, distance, most).amin(2)
    centres = best_rows(stack.flat(rho * delta), clusters.tolist(), n.tolist())
    # Every row belongs to the nearest centre of its set, a centre to itself.
    starts, firsts = starts_of(n)[:-1], starts_of(clusters)[:-1]
    in_set = Stack(firsts, clusters, x.device).of(centres) - table(starts[:, None])
    nearest = distance.gather(2, in_set[:, None].expand(-1, len(row), -1)).argmin(2)
    labels = stack.flat(nearest + table(firsts[:, None]))
    labels[centres] = torch.arange(len(centres), device=x.device)
    return centres, labels


def cluster_sums(x: Tensor, labels: Tensor, clusters: int) -> Tensor:
    """Sum of the rows of every cluster, shape (clusters, …)."""
    return x.new_zeros(clusters, *x.shape[1:]).index_add_(0, labels, x)


def cluster_sizes(labels: Tensor, clusters: int) -> Tensor:
    """Number of rows of every cluster, int64, shape (clusters,)."""
    return cluster_sums(torch.ones_like(labels), labels, clusters)
