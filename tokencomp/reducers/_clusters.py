"""Clusters around density peaks, which several methods for video merge into."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from tokencomp.reducers._batch import HostIndex, padded, rows_of, starts_of

ENTRIES = 1 << 23  # entries of a table of padded sets that are in memory at once
PADDING, SMALL = 4, 1 << 12  # most entries per entry of a set, and of any set


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
    starts, firsts = starts_of(lengths), starts_of(clusters)
    centres = torch.empty(int(firsts[-1]), dtype=torch.int64, device=x.device)
    labels = torch.empty(len(x), dtype=torch.int64, device=x.device)
    for sets in portions(np.square(lengths), ENTRIES):
        rows = torch.from_numpy(rows_of(starts, sets)).to(x.device)
        numbers = torch.from_numpy(rows_of(firsts, sets)).to(x.device)
        n, count, k = (np.asarray(v)[sets].tolist() for v in (lengths, clusters, neighbours))
        chosen, label = _peaks(x[rows].float(), n, count, k, scale, itself)
        centres[numbers], labels[rows] = rows[chosen], numbers[label]
    return centres, labels


def _peaks(
    x: Tensor,
    lengths: Sequence[int],
    clusters: Sequence[int],
    neighbours: Sequence[int],
    scale: float,
    itself: bool,
) -> tuple[Tensor, Tensor]:
    """`density_peaks` of sets that fit into memory together, in tables (sets, longest)."""
    from tokencomp.kernels import topk_stable

    def table(values: object) -> Tensor:
        return torch.from_numpy(np.asarray(values)).to(x.device)

    starts, firsts = starts_of(lengths)[:-1], starts_of(clusters)[:-1]
    places, n = padded(starts, lengths), np.asarray(lengths)[:, None]
    own = np.arange(places.shape[1]) < n
    valid, inside = table(np.flatnonzero(own)), table(own)
    y = x[table(places)]
    # Rows behind a set are copies of its last one, so that they change no maximum.
    distance = torch.cdist(y, y, compute_mode="donot_use_mm_for_euclid_dist") / scale
    others = distance.masked_fill(~inside[:, None], torch.inf)
    if not itself:
        others.diagonal(dim1=1, dim2=2).fill_(torch.inf)
    k = np.minimum(np.asarray(neighbours)[:, None], np.maximum(n - (not itself), 1))
    near = others.topk(int(k.max()), dim=2, largest=False).values.square()
    near = near.masked_fill(table(np.arange(k.max()) >= k)[:, None], 0)
    density = (near.sum(2) / table(k)).neg().exp().masked_fill(~inside, -1)
    row = torch.arange(len(places[0]), device=x.device)
    equal = (density[:, None] == density[:, :, None]) & (row < row[:, None])
    denser = (density[:, None] > density[:, :, None]) | equal
    most = distance.amax((1, 2), keepdim=True)
    separation = torch.where(denser, distance, most).amin(2)
    scores = (density * separation).flatten()[valid]
    centres = topk_stable(scores, list(clusters), spans=list(lengths))
    in_set = centres[table(padded(firsts, clusters))] - table(starts)[:, None]
    nearest = distance.gather(2, in_set[:, None].expand(-1, len(row), -1)).argmin(2)
    labels = (nearest + table(firsts)[:, None]).flatten()[valid]
    labels[centres] = torch.arange(len(centres), device=x.device)
    return centres, labels


def portions(entries: HostIndex, limit: int) -> Iterator[HostIndex]:
    """Sets whose tables, padded to the entries of the largest, fit into memory together.

    Small sets come first. None is padded to more than 4 times its entries, or to 2¹².
    """
    order = np.argsort(entries, kind="stable")
    first = 0
    for place, most in enumerate(entries[order].tolist()):
        if most > max(PADDING * entries[order[first]], SMALL) or most * (place + 1 - first) > limit:
            if place > first:
                yield order[first:place]
            first = place
    yield order[first:]


def cluster_sums(x: Tensor, labels: Tensor, clusters: int) -> Tensor:
    """Sum of the rows of every cluster, shape (clusters, …)."""
    return x.new_zeros(clusters, *x.shape[1:]).index_add_(0, labels, x)
