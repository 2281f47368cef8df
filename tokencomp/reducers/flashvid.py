"""Comparator: diverse salient tokens, and trees of like tokens along time."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from tokencomp.plan.counts import split_evenly
from tokencomp.plan.reducer import Traits
from tokencomp.reducers._batch import best_rows, means, salient, segment, with_merged
from tokencomp.reducers._clusters import cluster_sums, density_peaks
from tokencomp.reducers._segments import frame_cosines, segments
from tokencomp.reducers.base import Reducer
from tokencomp.reducers.registry import register_reducer
from tokencomp.tokens.kept import Kept
from tokencomp.tokens.signals import TOWER_ATTENTION
from tokencomp.tokens.stacks import HostIndex, Stack, by_stack, masked, real, rows_of, starts_of
from tokencomp.tokens.tokens import Tokens, rows_where
from tokencomp.validation import check_range

THRESHOLD, DIVERSE, LINK, NEIGHBOURS = 0.9, 0.7, 0.8, 7


@register_reducer("flashvid")
@dataclass(frozen=True)
class FlashVid(Reducer):
    """Diverse salient tokens of every frame, and the rest merged along time, then by clusters.

    FlashVID (arXiv 2602.08024), the part before the decoder. The video is cut into segments as in
    `fastvid`. Of the K_f tokens of a frame ⌈0.7 · K_f⌉ are chosen one by one, each the one with the
    largest attention in the vision tower × distance (1 - cos) from the nearest one chosen. Among
    the rest of a segment a token hangs on its most similar token of the frame before, if their
    cosine is above 0.8, and trees become their mean, at their first token. The density peaks of
    what is then left of every frame stay, as means of their clusters.

    Attributes
    ----------
    event
        Multiply distances by the mean product of a token with the frame means of its segment: the
        release's default ("v2"). On the embedded models this term is nearly the cosine with the
        frame's mean, and negative for single objects, which are then chosen last and lost. That is
        why it is off here ("v1"); whether large models behave like this is not known.
    least
        Fewest segments, 1 … 1024. With the published 8, every frame of a clip of up to 8 is a
        segment, and nothing merges along time.

    Notes
    -----
    Counts are exact, and means are weighted by the tokens that they stand for; the release divides
    by the number of direct children, so that long chains grow. In segments of one frame it clusters
    tokens that are chosen already once more; here they are out. It keeps 25 % more than asked for,
    because it prunes again inside of the decoder, which is left out here.
    """

    event: bool = False
    least: int = 8

    summary = "diverse salient tokens, trees along time (FlashVID 2602.08024)"
    traits = Traits(merges=True, grid="whole", batched=True)
    needs = frozenset({TOWER_ATTENTION})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("flashvid", "least", self.least, 1, 1024)

    def reduce(self, tokens: Tokens) -> Kept:
        x, attention = salient(tokens, "flashvid")
        lengths, each = list[int](), list[int]()
        likes, grids = frame_cosines(tokens, x), tokens.grids
        for like, budget, (t, h, w) in zip(likes, tokens.budgets, grids, strict=True):
            lengths += segments(like, THRESHOLD, self.least)
            each += split_evenly(budget, [h * w] * t)
        diverse = [math.ceil(own * DIVERSE - 1e-9) for own in each]
        by_frame = [(1, h, w) for t, h, w in grids for _ in range(t)]
        frames = replace(tokens, grids=by_frame, lengths=tokens.frame_lengths(), budgets=diverse)
        if self.event:
            middle = means(means(x, frames.lengths), lengths)
            owners = np.repeat(np.repeat(np.arange(len(lengths)), lengths), frames.lengths)
            attention = attention * (x * middle[tokens.table(owners)]).sum(1)
        unit = normalize(x, dim=1)

        def stays(members: HostIndex, stack: Stack, unit: Tensor, weights: Tensor) -> Tensor:
            return spread_out(unit, weights, stack.lengths, np.asarray(diverse)[members])

        stay = by_stack(frames.lengths, stays, unit, attention, keys=frames.lengths)
        chosen = rows_where(stay, sum(diverse))
        left = [own - count for own, count in zip(each, diverse, strict=True)]
        merged = trees(frames, x, unit, ~stay, lengths, left) if any(left) else None
        return with_merged(x, chosen, merged)


def spread_out(unit: Tensor, weights: Tensor, lengths: HostIndex, counts: HostIndex) -> Tensor:
    """Salient tokens of every frame that are unlike each other, bool (frames, n).

    Parameters
    ----------
    unit : Tensor, shape (frames, n, d)
    weights : Tensor, shape (frames, n)
    lengths, counts
        Tokens that every frame has, and how many of them it chooses.
    """
    (frames, n, _), most = unit.shape, int(counts.max())
    number = torch.arange(frames, device=unit.device)
    apart = (1 - unit @ unit.mT).clamp(min=0)
    apart.diagonal(dim1=1, dim2=2).zero_()
    distance = masked(apart * weights[:, None], lengths, -torch.inf)  # row: chosen, column: next
    others = masked(distance.mT, lengths, torch.inf)
    near = others.topk(min(2, n), dim=2, largest=False).values[..., -1]
    order = torch.empty(frames, most, dtype=torch.int64, device=unit.device)
    for step in range(most):
        order[:, step] = near.argmax(1)  # the first of those that tie
        own = distance[number, order[:, step]]
        near = own if step == 0 else torch.minimum(near, own)
        near = near.scatter(1, order[:, : step + 1], -torch.inf)
    # Behind its count a frame chooses something that it does not keep.
    chosen = (order + n * number[:, None]).flatten()
    if (counts < most).any():
        chosen = chosen[torch.from_numpy(np.flatnonzero(real(counts))).to(unit.device)]
    stay = torch.zeros(frames * n, dtype=torch.bool, device=unit.device)
    return stay.index_fill_(0, chosen, True).view(frames, n)


def trees(
    frames: Tokens, x: Tensor, unit: Tensor, free: Tensor, lengths: list[int], left: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens that stand for the free tokens of all segments: places, values and sizes.

    Parameters
    ----------
    frames
        The patches by frame; of each as many are not free as its budget.
    x, unit : Tensor, shape (n, d)
    free : Tensor of bool, shape (n,)
    lengths
        Frames of every segment.
    left
        How many tokens every frame may still keep: the sum counts for a segment.
    """
    starts, stops = starts_of(frames.lengths), starts_of(lengths)
    keep = np.add.reduceat(left, stops[:-1]).tolist()
    linked, parent, growing = links(frames, unit, free, lengths, keep)
    sums, sizes = x.clone(), x.new_ones(len(x))
    for step in range(max(growing.values(), default=0) - 1, 0, -1):
        # The last frame of the longest segment comes first, so that trees grow from their leaves.
        last = [first + step for first, length in growing.items() if length > step]
        rows = frames.table(rows_of(starts, last))
        # Rows that hang on nothing add 0, so that the host need not know which these are.
        sums.index_add_(0, parent[rows], sums[rows] * linked[rows, None])
        sizes.index_add_(0, parent[rows], sizes[rows] * linked[rows])
    roots = free & ~linked
    counts = [int(n) for n in segment(roots.float(), frames.lengths, "sum").tolist()]
    ends, clusters = starts_of(counts), list[int]()
    for (start, stop), count in zip(itertools.pairwise(stops), keep, strict=True):
        clusters += split_evenly(count, counts[start:stop])
    used = np.flatnonzero(clusters)
    own = rows_where(roots, int(ends[-1]))[frames.table(rows_of(ends, used))]
    few = [clusters[f] for f in used]
    centres, labels = density_peaks(
        sums[own] / sizes[own, None], [counts[f] for f in used], few,
        [min(NEIGHBOURS, count) for count in few], x.shape[1] ** 0.5,
    )  # fmt: skip
    total = cluster_sums(sizes[own], labels, sum(few))
    return own[centres], cluster_sums(sums[own], labels, sum(few)) / total[:, None], total


def links(
    frames: Tokens, unit: Tensor, free: Tensor, lengths: list[int], keep: list[int]
) -> tuple[Tensor, Tensor, dict[int, int]]:
    """Which tokens hang on one of the frame before, at most so many that `keep` can stay.

    Returns, per patch, whether it does (bool) and on which token it would hang (int64); and the
    segments with links, as their first frames and numbers of frames.
    """
    stops, sizes = starts_of(lengths), np.asarray(frames.lengths)
    linked, parent = torch.zeros_like(free), torch.zeros_like(free, dtype=torch.int64)
    later = np.setdiff1d(np.arange(len(sizes)), stops)
    if not len(later):
        return linked, parent, {}
    rows, found, best = likest(frames, unit, free, later)
    patches = [int(sizes[start + 1 : stop].sum()) for start, stop in itertools.pairwise(stops)]
    most = np.add.reduceat(sizes - frames.budgets, stops[:-1]) - keep
    alike = segment((best > LINK).float(), patches, "sum").tolist()
    counts = [min(int(n), int(room)) for n, room in zip(alike, most, strict=True)]
    linked[rows[best_rows(best, counts, patches)]] = True
    growing = {int(stops[i]): lengths[i] for i, count in enumerate(counts) if count}
    return linked, parent.index_copy(0, rows, found), growing


def likest(
    frames: Tokens, unit: Tensor, free: Tensor, numbers: HostIndex
) -> tuple[Tensor, Tensor, Tensor]:
    """The token of the frame before that every token of some frames resembles most.

    Returns, all (n,): the tokens of these frames; for each, the free token of the frame before with
    the largest cosine; and that cosine, -inf where one of the two is not free.
    """

    def of_stack(_: HostIndex, stack: Stack, own: Tensor, others: Tensor, free: Tensor) -> Tensor:
        likes = (own @ others.mT).masked_fill(~free[:, None], -torch.inf)
        best, place = masked(likes, stack.lengths, -torch.inf).max(2)
        return torch.stack([best, place.to(best)], 2)  # exact below 2²⁴

    starts, sizes = starts_of(frames.lengths), np.asarray(frames.lengths)[numbers]
    host, shift = rows_of(starts, numbers), np.repeat(sizes, sizes)
    rows, before = frames.table(host), frames.table(host - shift)
    best, place = by_stack(sizes, of_stack, unit[rows], unit[before], free[before]).unbind(1)
    first = frames.table(np.repeat(starts[numbers], sizes) - shift)
    return rows, place.long() + first, best.masked_fill(~free[rows], -torch.inf)
