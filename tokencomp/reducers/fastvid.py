"""Comparator: density peaks of anchor frames take in the rest of their segment."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from tokencomp.plan.counts import split_evenly
from tokencomp.plan.reducer import Traits
from tokencomp.reducers._batch import best_rows, salient, with_merged
from tokencomp.reducers._clusters import density_peaks
from tokencomp.reducers._segments import frame_cosines, segments
from tokencomp.reducers.base import Reducer
from tokencomp.reducers.registry import register_reducer
from tokencomp.tokens.kept import Kept
from tokencomp.tokens.signals import TOWER_ATTENTION
from tokencomp.tokens.stacks import HostIndex, Stack, masked, portions, rows_of, starts_of
from tokencomp.tokens.tokens import Tokens, rows_where
from tokencomp.validation import check_range

THRESHOLD, CONTEXT, STRIDE, NEIGHBOURS, OWN = 0.9, 0.4, 4, 4, 0.6
LIMIT = 1 << 25  # entries of features and cosines in memory at once


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
    LLaVA-OneVision does not load. `Kept.weights` counts a token once over all anchors.
    """

    least: int = 8

    summary = "salient tokens, and density peaks of anchor frames (FastVID 2503.11187)"
    traits = Traits(merges=True, grid="whole", batched=True)
    needs = frozenset({TOWER_ATTENTION})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("fastvid", "least", self.least, 1, 1024)

    def reduce(self, tokens: Tokens) -> Kept:
        x, attention = salient(tokens, "fastvid")
        lengths, counts, context = list[int](), list[int](), list[int]()
        likes, grids = frame_cosines(tokens, x), tokens.grids
        for like, budget, (_, h, w) in zip(likes, tokens.budgets, grids, strict=True):
            own = segments(like, THRESHOLD, self.least)
            chosen_here, context_here = frame_counts(own, budget, h * w)
            lengths, counts, context = lengths + own, counts + chosen_here, context + context_here
        frames = tokens.frame_lengths()
        chosen = best_rows(attention, counts, frames)
        if not any(context):
            return with_merged(x, chosen, None)
        free = torch.ones(len(x), dtype=torch.bool, device=x.device).index_fill_(0, chosen, False)
        rest = rows_where(free, len(x) - len(chosen))
        left = [n - own for n, own in zip(frames, counts, strict=True)]
        anchors = around_anchors(tokens, x, rest, left, lengths, context)
        return with_merged(x, chosen, anchors)


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


def around_anchors(
    tokens: Tokens,
    x: Tensor,
    rest: Tensor,
    left: list[int],
    lengths: list[int],
    context: list[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """The density peaks of all anchors: patches, their values and sizes.

    Parameters
    ----------
    rest : Tensor of int64
        Patches that are not salient, ascending; `left` says how many of them every frame has.
    lengths
        Frames of every segment.
    context
        Peaks of every frame; of frames that are no anchors 0.
    """
    ends, stops = starts_of(left), starts_of(lengths)
    anchors = np.flatnonzero(context)
    segment = np.repeat(np.arange(len(lengths)), lengths)[anchors]
    counts = [context[f] for f in anchors]
    own = rest[tokens.table(rows_of(ends, anchors))]
    near = [NEIGHBOURS] * len(counts)
    peaks, _ = density_peaks(x[own], [left[f] for f in anchors], counts, near, x.shape[1] ** 0.5)
    centres = own[peaks]
    # Of every anchor the rest of its segment goes to the nearest centre.
    firsts, ends = ends[stops[segment]], ends[stops[segment + 1]]
    sums, members = around(tokens, x, rest, (firsts, ends - firsts), centres, counts)
    mean = sums / members.clamp(min=1)
    share = (1 / (members + 1)).clamp(min=OWN)
    value = torch.where(members > 0, share * x[centres] + (1 - share) * mean, x[centres])
    sharing = tokens.table(np.repeat(np.bincount(segment)[segment], counts))
    sizes = members[:, 0] / sharing
    return centres, value, sizes.clamp(min=1)


def around(
    tokens: Tokens,
    x: Tensor,
    rest: Tensor,
    runs: tuple[HostIndex, HostIndex],
    centres: Tensor,
    counts: list[int],
) -> tuple[Tensor, Tensor]:
    """Sum and number of the patches around every centre, (centres, d) and (centres, 1).

    Parameters
    ----------
    runs
        For every anchor the first of the `rest` that go to its centres, and how many do.
    counts
        Centres of every anchor.
    """
    unit, begins, count = normalize(x, dim=1), starts_of(counts), np.asarray(counts)
    sums, members = x.new_zeros(len(centres), x.shape[1]), x.new_zeros(len(centres), 1)
    for part in portions(runs[1] * (x.shape[1] + max(counts)), LIMIT):
        stack = Stack(runs[0][part], runs[1][part], x.device)
        picked = Stack(begins[part], count[part], x.device)
        rows, own = stack.of(rest), picked.of(centres)
        nearest = masked(unit[rows] @ unit[own].mT, picked.lengths, -torch.inf).argmax(2)
        labels = stack.flat(nearest + tokens.table(begins[part])[:, None])
        rows = stack.flat(rows)
        sums.index_add_(0, labels, x[rows])
        members.index_add_(0, labels, x.new_ones(len(rows), 1))
    return sums, members
