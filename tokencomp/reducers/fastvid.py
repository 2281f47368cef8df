"""Comparator: density peaks of anchor frames take in the rest of their segment."""

from __future__ import annotations

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

THRESHOLD, CONTEXT, STRIDE, NEIGHBOURS, OWN = 0.9, 0.4, 4, 4, 0.6


@register_reducer("fastvid")
@dataclass(frozen=True)
class FastVid(Reducer):
    """Salient tokens of every frame, and means around the density peaks of anchor frames.

    FastVID (arXiv 2503.11187). The video is cut into segments of like frames (cosine of frame means
    below 0.9, and at least `least` segments). Of the K_f tokens of a frame ⌊0.4 · K_f⌋ are context,
    the others the tokens with the largest attention in the vision tower. All context of a segment
    goes to its anchors, every fourth frame counted from the last: the density peaks of an anchor's
    other tokens are centres. Every token of the segment that is not salient goes to the nearest
    centre (cosine) of every anchor, and a centre becomes ω · itself + (1 - ω) · the mean of the cnt
    that went to it, ω = max(1 / (cnt + 1), 0.6).

    Attributes
    ----------
    least
        Fewest segments, 1 … 1024. With the published 8, every frame of a clip of up to 8 is a
        segment, and nothing merges along time.

    Notes
    -----
    Counts are exact: K is split evenly over the frames and a segment's context over its anchors,
    where the release rounds down. What anchors cannot hold stays as salient tokens of the other
    frames (ours). Frames are described by the mean of their projected tokens, as in the release for
    Qwen; its other threshold and its skipped frames for Qwen2.5-VL are left out. Attention is that
    of the last block, where the release for LLaVA reads SigLIP's pooling head, which Hugging Face's
    LLaVA-OneVision does not load. `Reduction.sizes` counts a token once over all anchors.
    """

    least: int = 8

    summary = "salient tokens, and density peaks of anchor frames (FastVID 2503.11187)"
    merges = True
    grid = "whole"
    needs = frozenset({TOWER_ATTENTION})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("fastvid", "least", self.least, 1, 1024)

    def reduce(self, tokens: VisualTokens, keep: int) -> Reduction:
        rows, budget, x, attention = salient_rows(tokens, keep, "fastvid", whole=True)
        t, n = tokens.grid[0], len(rows) // tokens.grid[0]
        x, attention = x.view(t, n, -1), attention.view(t, n)
        lengths = segments(x.mean(1), THRESHOLD, self.least)
        salient, context = frame_counts(lengths, budget, n)
        kept, first = [], 0
        for length in lengths:
            frames = slice(first, first + length)
            part = _segment(x[frames], attention[frames], salient[frames], context[frames])
            kept += [(places + first * n, values, sizes) for places, values, sizes in part]
            first += length
        places, values, sizes = (torch.cat(column) for column in zip(*kept, strict=True))
        return replace_patches(tokens, rows[places], values, sizes)


def frame_counts(lengths: list[int], budget: int, n: int) -> tuple[list[int], list[int]]:
    """Salient and context tokens of every frame, of `budget` in frames of n tokens."""
    each = split_evenly(budget, [n] * sum(lengths))
    context = [int(own * CONTEXT + 1e-9) for own in each]
    salient = [own - part for own, part in zip(each, context, strict=True)]
    moved, first = [0] * len(each), 0
    for length in lengths:
        frames = range(first, first + length)
        first += length
        anchors = [f for f in frames if (frames[-1] - f) % STRIDE == 0]
        room = [n - salient[f] for f in anchors]
        total = sum(context[f] for f in frames)
        for f, count in zip(anchors, split_evenly(min(total, sum(room)), room), strict=True):
            moved[f] = count
        others = [f for f in frames if f not in anchors]
        left = split_evenly(max(0, total - sum(room)), [n - salient[f] for f in others])
        for f, count in zip(others, left, strict=True):
            salient[f] += count
    return salient, moved


def _segment(
    x: Tensor, attention: Tensor, salient: list[int], context: list[int]
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Places, values and sizes of what stays of a segment x (frames, n, d), part by part."""
    from tokencomp.kernels import topk_stable

    frames, n, d = x.shape
    flat = x.flatten(0, 1)
    chosen = topk_stable(attention.flatten(), salient, spans=[n] * frames)
    kept = [(chosen, flat[chosen], x.new_ones(len(chosen)))]
    free = torch.ones(frames * n, dtype=torch.bool, device=x.device)
    free[chosen] = False
    rest = free.nonzero()[:, 0]
    unit, anchors = normalize(flat, dim=1), sum(count > 0 for count in context)
    for frame, count in enumerate(context):
        if count == 0:
            continue
        own = rest[(rest >= frame * n) & (rest < (frame + 1) * n)]
        centres = own[dpc_knn(distances(flat[own]) / d**0.5, count, NEIGHBOURS)[0]]
        nearest = (unit[rest] @ unit[centres].T).argmax(1)
        counts = torch.bincount(nearest, minlength=count)[:, None]
        mean = cluster_sums(flat[rest], nearest, count) / counts.clamp(min=1)
        share = (1 / (counts + 1)).clamp(min=OWN)
        value = torch.where(counts > 0, share * flat[centres] + (1 - share) * mean, flat[centres])
        kept.append((centres, value, (counts[:, 0] / anchors).clamp(min=1)))
    return kept
