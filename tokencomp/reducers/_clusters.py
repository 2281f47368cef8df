"""Clusters around density peaks, which several methods for video merge into."""

from __future__ import annotations

import torch
from torch import Tensor


def distances(x: Tensor) -> Tensor:
    """Euclidean distances of all pairs of rows of x (n, d), float32; 0 between copies."""
    return torch.cdist(x.float(), x.float(), compute_mode="donot_use_mm_for_euclid_dist")


def dpc_knn(
    distance: Tensor, clusters: int, neighbours: int, itself: bool = True
) -> tuple[Tensor, Tensor]:
    """Density peaks with k nearest neighbours: centres, and the cluster of every row.

    The density of a row is ρ = exp(-mean of its k smallest squared distances), and its separation δ
    the distance to the nearest row of higher density, or the largest distance of all for the
    densest one. Centres have the largest ρ·δ. Every row belongs to the nearest centre. Releases add
    noise to break ties; here the lower row counts as denser, and ties of all else go to the lower
    row, so that the result does not change.

    Parameters
    ----------
    distance : Tensor of float32, shape (n, n)
    clusters
        Number of centres, 1 … n.
    neighbours
        k, at most as many as there are.
    itself
        Whether the row itself (distance 0) is one of the k.

    Returns
    -------
    centres : Tensor of int64, shape (clusters,)
        Ascending.
    labels : Tensor of int64, shape (n,)
        Numbers of centres.
    """
    from tokencomp.kernels import topk_stable

    rows = torch.arange(len(distance), device=distance.device)
    if clusters == len(distance):
        return rows, rows
    others = distance if itself else distance.clone().fill_diagonal_(torch.inf)
    near = others.topk(min(neighbours, len(rows) - (not itself)), dim=1, largest=False).values
    density = near.square().mean(1).neg().exp()
    equal = (density[None] == density[:, None]) & (rows[None] < rows[:, None])
    denser = (density[None] > density[:, None]) | equal
    separation = torch.where(denser, distance, distance.max()).amin(1)
    centres = topk_stable(density * separation, clusters)
    labels = distance[:, centres].argmin(1)
    labels[centres] = rows[:clusters]
    return centres, labels


def cluster_sums(x: Tensor, labels: Tensor, clusters: int) -> Tensor:
    """Sum of the rows of every cluster, shape (clusters, …)."""
    return x.new_zeros(clusters, *x.shape[1:]).index_add_(0, labels, x)
