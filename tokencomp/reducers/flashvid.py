"""Comparator: diverse salient tokens, and trees of like tokens along time."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from tokencomp.plan.counts import split_evenly
from tokencomp.reducers._clusters import cluster_sums, distances, dpc_knn
from tokencomp.reducers._rows import replace_patches, salient_rows
from tokencomp.reducers._segments import segments
from tokencomp.reducers.base import Reducer
from tokencomp.reducers.registry import register_reducer
from tokencomp.tokens.reduction import Reduction
from tokencomp.tokens.signals import TOWER_ATTENTION
from tokencomp.tokens.spans import VisualTokens
from tokencomp.validation import check_range

THRESHOLD, DIVERSE, LINK, NEIGHBOURS = 0.9, 0.7, 0.8, 7
Parts = list[tuple[Tensor, Tensor, Tensor]]


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
    merges = True
    grid = "whole"
    needs = frozenset({TOWER_ATTENTION})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("flashvid", "least", self.least, 1, 1024)

    def reduce(self, tokens: VisualTokens, keep: int) -> Reduction:
        rows, budget, x, attention = salient_rows(tokens, keep, "flashvid", whole=True)
        t, n = tokens.grid[0], len(rows) // tokens.grid[0]
        x, attention = x.view(t, n, -1), attention.view(t, n)
        each = split_evenly(budget, [n] * t)
        kept: Parts = []
        first = 0
        for length in segments(x.mean(1), THRESHOLD, self.least):
            frames = slice(first, first + length)
            part, weights = x[frames], attention[frames]
            if self.event:
                weights = weights * (part @ part.mean(1).T).mean(2)
            diverse = [math.ceil(own * DIVERSE - 1e-9) for own in each[frames]]
            chosen = spread_out(normalize(part, dim=2), weights, diverse) + first * n
            kept.append((chosen, x.flatten(0, 1)[chosen], x.new_ones(len(chosen))))
            left = sum(each[frames]) - sum(diverse)
            if left:
                free = torch.ones(length * n, dtype=torch.bool, device=x.device)
                free[chosen - first * n] = False
                own = trees(part, free.view(length, n), left)
                kept += [(places + first * n, value, sizes) for places, value, sizes in own]
            first += length
        at, values, sizes = (torch.cat(column) for column in zip(*kept, strict=True))
        return replace_patches(tokens, rows[at], values, sizes)


def spread_out(unit: Tensor, weights: Tensor, counts: list[int]) -> Tensor:
    """Salient tokens of every frame that are unlike each other, ascending.

    Parameters
    ----------
    unit : Tensor, shape (frames, n, d)
    weights : Tensor, shape (frames, n)
    counts
        Tokens that every frame chooses.
    """
    from tokencomp.kernels import topk_stable

    frames, n, _ = unit.shape
    number = torch.arange(frames, device=unit.device)
    apart = (1 - unit @ unit.mT).clamp(min=0)
    apart.diagonal(dim1=1, dim2=2).zero_()
    distance = apart * weights[:, None]  # row: chosen, column: next
    near = distance.topk(min(2, n), dim=1, largest=False).values[:, -1]
    order = torch.empty(frames, max(counts), dtype=torch.int64, device=unit.device)
    for step in range(max(counts)):
        order[:, step] = topk_stable(near, 1)[:, 0]
        own = distance[number, order[:, step]]
        near = own if step == 0 else torch.minimum(near, own)
        near = near.scatter(1, order[:, : step + 1], -torch.inf)
    chosen = [order[f, :count].sort().values + f * n for f, count in enumerate(counts)]
    return torch.cat(chosen)


def trees(x: Tensor, free: Tensor, keep: int) -> Parts:
    """`keep` rows that stand for the free tokens of a segment: places, values and sizes by frame.

    Parameters
    ----------
    x : Tensor, shape (frames, n, d)
    free : Tensor of bool, shape (frames, n)
    """
    frames, n, d = x.shape
    unit = normalize(x, dim=2)
    similarity = (unit[1:] @ unit[:-1].mT).masked_fill(~free[:-1, None], -torch.inf)
    best, parent = similarity.max(2)
    best = best.masked_fill(~free[1:], -torch.inf)
    links = int(torch.minimum((best > LINK).sum(), free.sum() - keep))
    linked = torch.zeros(free.numel(), dtype=torch.bool, device=x.device)
    linked[n + best.flatten().sort(descending=True, stable=True).indices[:links]] = True
    linked = linked.view_as(free)
    sums, sizes = x.clone(), x.new_ones(frames, n)
    for f in range(frames - 1, 0, -1):
        # Rows that hang on nothing add 0, so that the host need not know which these are.
        sums[f - 1].index_add_(0, parent[f - 1], sums[f] * linked[f, :, None])
        sizes[f - 1].index_add_(0, parent[f - 1], sizes[f] * linked[f])
    roots = free & ~linked
    parts: Parts = []
    for f, count in enumerate(split_evenly(keep, roots.sum(1).tolist())):
        if count:
            own = roots[f].nonzero()[:, 0]
            distance = distances(sums[f, own] / sizes[f, own, None]) / d**0.5
            centres, labels = dpc_knn(distance, count, min(NEIGHBOURS, count))
            total = cluster_sums(sizes[f, own], labels, count)
            value = cluster_sums(sums[f, own], labels, count) / total[:, None]
            parts.append((f * n + own[centres], value, total))
    return parts
