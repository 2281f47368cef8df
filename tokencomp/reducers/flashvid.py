"""FlashVID: diverse salient tokens, and trees of similar tokens over time (arXiv 2602.08024)."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from tokencomp.plan.counts import split_evenly
from tokencomp.reducers import Kept, Reducer, Tokens, Traits, best_rows, register_reducer
from tokencomp.reducers._batch import means, segment, with_merged
from tokencomp.reducers._clusters import cluster_sums, density_peaks
from tokencomp.reducers._segments import frame_cosines, segments
from tokencomp.reducers.base import salient
from tokencomp.tokens.signals import TOWER_ATTENTION
from tokencomp.tokens.stacks import HostIndex, Stack, by_stack, masked, real, rows_of, starts_of
from tokencomp.tokens.tokens import rows_where
from tokencomp.validation import between

TAU, ALPHA, T_MERGE, NEIGHBOURS = 0.9, 0.7, 0.8, 7


@register_reducer("flashvid")
@dataclass(frozen=True)
class FlashVid(Reducer):
    """Diverse salient tokens of every frame; the rest is merged over time, then by clusters.

    FlashVID (arXiv 2602.08024), the part before the decoder, with segments as in `fastvid`. A frame
    with K_f tokens and attention a_i of the vision tower keeps

        ADTS: ⌈0.7 · K_f⌉ tokens,  next = argmax_i  min over kept j of a_i · (1 - cos(x_i, x_j))
        TSTM: a token's parent is its most similar token of the frame before, if cos > 0.8;
              a tree becomes its mean, at its root
        then the density peaks (DPC-KNN) of the roots of every frame, as means of their clusters

    Deviations from the release:

    - Counts are exact. The release keeps 25 % more than requested, because it prunes again inside
      the decoder, which is left out here.
    - Means are weighted by the number of tokens; the release divides by the number of children, so
      that long chains grow.
    - In segments of one frame it clusters tokens that are kept already; here they are excluded.

    Attributes
    ----------
    event
        True: distances are also multiplied by the product of a token with its segment's mean frame,
        the release's default ("v2"). On the embedded models this is nearly the cosine with the
        frame's mean, and negative for single objects, which are then chosen last. So it is off here
        ("v1"); large models were not tested.
    least
        Fewest segments, 1 … 1024. With the published 8, every frame of a clip of up to 8 frames is
        a segment, and nothing is merged over time.
    """

    event: bool = False
    least: int = field(default=8, metadata=between(1, 1024))

    summary = "diverse salient tokens, trees along time (FlashVID 2602.08024)"
    traits = Traits(merges=True, grid="whole", batched=True)
    needs = frozenset({TOWER_ATTENTION})

    def reduce(self, tokens: Tokens) -> Kept:
        x, attention = salient(tokens, "flashvid")
        lengths, each, grids = list[int](), list[int](), tokens.grids
        spans = zip(frame_cosines(tokens, x), tokens.budgets, grids, strict=True)
        for cosines, budget, (t, h, w) in spans:
            lengths += segments(cosines, TAU, self.least)
            each += split_evenly(budget, [h * w] * t)
        diverse = [math.ceil(count * ALPHA) for count in each]
        by_frame = [(1, h, w) for t, h, w in grids for _ in range(t)]
        frames = replace(tokens, grids=by_frame, lengths=tokens.frame_lengths(), budgets=diverse)
        if self.event:
            event = means(means(x, frames.lengths), lengths)
            segment = np.repeat(np.repeat(np.arange(len(lengths)), lengths), frames.lengths)
            attention = attention * (x * event[tokens.table(segment)]).sum(1)
        unit = normalize(x, dim=1)

        def choose(members: HostIndex, stack: Stack, unit: Tensor, weights: Tensor) -> Tensor:
            return diverse_mask(unit, weights, stack, np.asarray(diverse)[members])

        mask = by_stack(frames.lengths, choose, unit, attention, keys=frames.lengths)
        chosen = rows_where(mask, sum(diverse))
        rest = [count - part for count, part in zip(each, diverse, strict=True)]
        merged = trees(frames, x, unit, ~mask, lengths, rest) if any(rest) else None
        return with_merged(x, chosen, merged)


def diverse_mask(unit: Tensor, weights: Tensor, stack: Stack, counts: HostIndex) -> Tensor:
    """The `counts` diverse salient tokens of every frame, bool (frames, n).

    From unit features (frames, n, d) and weights (frames, n).
    """
    (frames, n, _), most, lengths = unit.shape, int(counts.max()), stack.lengths
    frame = torch.arange(frames, device=unit.device)
    distance = (1 - unit @ unit.mT).clamp(min=0)
    distance.diagonal(dim1=1, dim2=2).zero_()
    distance = masked(distance * weights[:, None], lengths, -torch.inf)  # (kept j, next i)
    # The first token is the one whose nearest neighbour (besides itself) is farthest.
    others = masked(distance.mT, lengths, torch.inf)
    near = others.topk(min(2, n), dim=2, largest=False).values[..., -1]
    order = torch.empty(frames, most, dtype=torch.int64, device=unit.device)
    for step in range(most):
        order[:, step] = near.argmax(1)  # ties: the lower row
        of_last = distance[frame, order[:, step]]
        near = of_last if step == 0 else torch.minimum(near, of_last)
        near = near.scatter(1, order[:, : step + 1], -torch.inf)
    # All frames take `most` steps; those after a frame's count are cut off.
    chosen = (order + n * frame[:, None]).flatten()
    if (counts < most).any():
        chosen = chosen[stack.table(np.flatnonzero(real(counts)))]
    mask = torch.zeros(frames * n, dtype=torch.bool, device=unit.device)
    return mask.index_fill_(0, chosen, True).view(frames, n)


def trees(
    frames: Tokens, x: Tensor, unit: Tensor, free: Tensor, lengths: list[int], rest: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Merge the tokens that are `free`, bool (n,): rows, features and weights of what is kept.

    The budgets of `frames` are the counts of diverse tokens; `lengths` are the frames of every
    segment, and `rest` says how many more tokens every frame may keep, of which only the sum over a
    segment counts.
    """
    starts, stops = starts_of(frames.lengths), starts_of(lengths)
    keep = np.add.reduceat(rest, stops[:-1]).tolist()
    linked, parent, growing = links(frames, unit, free, lengths, keep)
    # Sums and sizes move from the leaves, in last frames of segments, to the roots. Rows without a
    # parent add 0, so that the host need not know which they are.
    sums, sizes = x.clone(), x.new_ones(len(x))
    for step in range(max(growing.values(), default=0) - 1, 0, -1):
        leaves = [first + step for first, length in growing.items() if length > step]
        rows = frames.table(rows_of(starts, leaves))
        sums.index_add_(0, parent[rows], sums[rows] * linked[rows, None])
        sizes.index_add_(0, parent[rows], sizes[rows] * linked[rows])
    # The budget of a segment is divided over its frames by their number of roots.
    is_root = free & ~linked
    counts = [int(n) for n in segment(is_root.float(), frames.lengths, "sum").tolist()]
    ends, budgets = starts_of(counts), list[int]()
    for (start, stop), count in zip(itertools.pairwise(stops), keep, strict=True):
        budgets += split_evenly(count, counts[start:stop])
    used = np.flatnonzero(budgets)
    roots = rows_where(is_root, int(ends[-1]))[frames.table(rows_of(ends, used))]
    # The roots of a frame are clustered, and a cluster becomes the mean of all its tokens.
    clusters = [budgets[f] for f in used]
    centres, labels = density_peaks(
        sums[roots] / sizes[roots, None], [counts[f] for f in used], clusters,
        [min(NEIGHBOURS, count) for count in clusters], x.shape[1] ** 0.5,
    )  # fmt: skip
    total = cluster_sums(sizes[roots], labels, len(centres))
    return roots[centres], cluster_sums(sums[roots], labels, len(centres)) / total[:, None], total


def links(
    frames: Tokens, unit: Tensor, free: Tensor, lengths: list[int], keep: list[int]
) -> tuple[Tensor, Tensor, dict[int, int]]:
    """Edges of the trees, so few that `keep` roots remain in every segment.

    Returns, per patch, whether it has a parent (bool), and its possible parent (int64); and a dict
    of the segments with edges, from their first frame to their number of frames.
    """
    stops, sizes = starts_of(lengths), np.asarray(frames.lengths)
    linked, parent = torch.zeros_like(free), torch.zeros_like(free, dtype=torch.int64)
    later = np.setdiff1d(np.arange(len(sizes)), stops)
    if not len(later):
        return linked, parent, {}
    rows, found, best = most_similar(frames, unit, free, later)
    patches = [int(sizes[start + 1 : stop].sum()) for start, stop in itertools.pairwise(stops)]
    # Every link removes one root: at least `keep` roots must remain in a segment.
    most = np.add.reduceat(sizes - frames.budgets, stops[:-1]) - keep
    similar = segment((best > T_MERGE).float(), patches, "sum").tolist()
    counts = [min(int(n), int(room)) for n, room in zip(similar, most, strict=True)]
    linked[rows[best_rows(best, counts, patches)]] = True
    growing = {int(stops[i]): lengths[i] for i, count in enumerate(counts) if count}
    return linked, parent.index_copy(0, rows, found), growing


def most_similar(
    frames: Tokens, unit: Tensor, free: Tensor, numbers: HostIndex
) -> tuple[Tensor, Tensor, Tensor]:
    """The most similar free token of the frame before, for the tokens of the frames `numbers`.

    Returns, all (n,): the rows of these tokens; the row of the free token of largest cosine; and
    that cosine, -inf if one of the two is not free.
    """

    def of_stack(_: HostIndex, stack: Stack, x: Tensor, before: Tensor, free: Tensor) -> Tensor:
        cosines = (x @ before.mT).masked_fill(~free[:, None], -torch.inf)
        best, place = masked(cosines, stack.lengths, -torch.inf).max(2)
        return torch.stack([best, place.to(best)], 2)  # float32 is exact below 2²⁴

    starts, sizes = starts_of(frames.lengths), np.asarray(frames.lengths)[numbers]
    host, shift = rows_of(starts, numbers), np.repeat(sizes, sizes)
    rows, before = frames.table(host), frames.table(host - shift)
    best, place = by_stack(sizes, of_stack, unit[rows], unit[before], free[before]).unbind(1)
    first = frames.table(np.repeat(starts[numbers], sizes) - shift)
    return rows, place.long() + first, best.masked_fill(~free[rows], -torch.inf)
