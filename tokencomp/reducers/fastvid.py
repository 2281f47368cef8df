"""FastVID: density-based merging around anchor frames (arXiv 2503.11187)."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from tokencomp.plan.counts import split_evenly
from tokencomp.reducers import Kept, Reducer, Tokens, Traits, best_rows, register_reducer
from tokencomp.reducers._batch import complement, with_merged
from tokencomp.reducers._clusters import density_peaks
from tokencomp.reducers._segments import frame_cosines, segments
from tokencomp.reducers.base import salient
from tokencomp.tokens.signals import TOWER_ATTENTION
from tokencomp.tokens.stacks import HostIndex, Stack, masked, portions, rows_of, starts_of
from tokencomp.validation import between

TAU, CONTEXT, STRIDE, NEIGHBOURS, BETA = 0.9, 0.4, 4, 4, 0.6
LIMIT = 1 << 25  # entries of features and cosines in memory at once


@register_reducer("fastvid")
@dataclass(frozen=True)
class FastVid(Reducer):
    """Salient tokens of every frame, and means around the density peaks of anchor frames.

    FastVID (arXiv 2503.11187). A frame with K_f tokens keeps ⌊0.4 · K_f⌋ context tokens; the others
    are its tokens of largest attention in the vision tower:

        segments: cut where the cosine of successive frame means < τ = 0.9, at least `least`
        anchors:  every fourth frame of a segment, counted from the last; they hold its context
        centres:  density peaks (DPC-KNN) of the other tokens of an anchor
        x_c     ← ω · x_c + (1 - ω) · mean of the cnt tokens assigned to c,
                  ω = max(1 / (cnt + 1), β = 0.6)

    Every token of a segment that is not salient is assigned, in each anchor, to the centre of
    largest cosine.

    Deviations from the release:

    - Counts are exact: K is split evenly over frames, and the context of a segment over its
      anchors; the release rounds down. Context that anchors cannot hold becomes salient tokens of
      other frames (ours).
    - Frames are described by the mean of their projected tokens, as there for Qwen; its other
      threshold and skipped frames for Qwen2.5-VL are left out.
    - Attention is the last block's; for LLaVA the release reads the pooling head of SigLIP,
      which Hugging Face's LLaVA-OneVision does not load.
    - `Kept.weights` counts a merged token once, divided over all anchors of its segment.

    Attributes
    ----------
    least
        Fewest segments, 1 … 1024. With the published 8, every frame of a clip of up to 8 frames is
        a segment, and nothing is merged over time.
    """

    least: int = field(default=8, metadata=between(1, 1024))

    summary = "salient tokens, and density peaks of anchor frames (FastVID 2503.11187)"
    traits = Traits(merges=True, grid="whole", batched=True)
    needs = frozenset({TOWER_ATTENTION})

    def reduce(self, tokens: Tokens) -> Kept:
        x, attention = salient(tokens, "fastvid")
        lengths, counts, context = list[int](), list[int](), list[int]()
        spans = zip(frame_cosines(tokens, x), tokens.budgets, tokens.grids, strict=True)
        for cosines, budget, (_, h, w) in spans:
            of_span = segments(cosines, TAU, self.least)
            n_salient, n_context = frame_counts(of_span, budget, h * w)
            lengths, counts, context = lengths + of_span, counts + n_salient, context + n_context
        frames = tokens.frame_lengths()
        chosen = best_rows(attention, counts, frames)
        if not any(context):
            return with_merged(x, chosen, None)
        rest = complement(chosen, len(x))
        rest_counts = [n - count for n, count in zip(frames, counts, strict=True)]
        return with_merged(x, chosen, anchors(tokens, x, rest, rest_counts, lengths, context))


def frame_counts(lengths: list[int], budget: int, n: int) -> tuple[list[int], list[int]]:
    """Salient and context tokens of every frame: `budget` in frames of n tokens.

    `lengths` are the frames of every segment.
    """
    each = split_evenly(budget, [n] * sum(lengths))
    context = [int(count * CONTEXT) for count in each]
    salient = [count - part for count, part in zip(each, context, strict=True)]
    of_anchors, first = [0] * len(each), 0
    for length in lengths:
        # The context of a segment is divided over its anchors.
        frames = range(first, first + length)
        first += length
        anchors = [f for f in frames if (frames[-1] - f) % STRIDE == 0]
        room = [n - salient[f] for f in anchors]
        total = sum(context[f] for f in frames)
        for f, count in zip(anchors, split_evenly(min(total, sum(room)), room), strict=True):
            of_anchors[f] = count
        # What anchors cannot hold becomes salient tokens of the other frames.
        others = [f for f in frames if f not in anchors]
        excess = split_evenly(max(0, total - sum(room)), [n - salient[f] for f in others])
        for f, count in zip(others, excess, strict=True):
            salient[f] += count
    return salient, of_anchors


def anchors(
    tokens: Tokens,
    x: Tensor,
    rest: Tensor,
    rest_counts: list[int],
    lengths: list[int],
    context: list[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """The context tokens of all anchors: rows, merged features and weights.

    `rest` are the patches that are not salient, ascending, `rest_counts` of them in every frame;
    `lengths` the frames of every segment, `context` the context tokens of every frame (0 if no
    anchor).
    """
    ends, stops = starts_of(rest_counts), starts_of(lengths)
    frames = np.flatnonzero(context)
    segment = np.repeat(np.arange(len(lengths)), lengths)[frames]
    counts = [context[f] for f in frames]
    # Centres: the density peaks of the rest of every anchor frame.
    rows = rest[tokens.table(rows_of(ends, frames))]
    sizes, near = [rest_counts[f] for f in frames], [NEIGHBOURS] * len(counts)
    peaks, _ = density_peaks(x[rows], sizes, counts, near, x.shape[1] ** 0.5)
    centres = rows[peaks]
    # For every anchor, the rest of its segment is assigned to the nearest centre.
    firsts, ends = ends[stops[segment]], ends[stops[segment + 1]]
    sums, members = assigned(tokens, x, rest, (firsts, ends - firsts), centres, counts)
    mean = sums / members.clamp(min=1)
    omega = (1 / (members + 1)).clamp(min=BETA)
    value = torch.where(members > 0, omega * x[centres] + (1 - omega) * mean, x[centres])
    anchors_of_segment = tokens.table(np.repeat(np.bincount(segment)[segment], counts))
    weights = members[:, 0] / anchors_of_segment
    return centres, value, weights.clamp(min=1)


def assigned(
    tokens: Tokens,
    x: Tensor,
    rest: Tensor,
    runs: tuple[HostIndex, HostIndex],
    centres: Tensor,
    counts: list[int],
) -> tuple[Tensor, Tensor]:
    """Sum (centres, d) and number (centres, 1) of the patches assigned to every centre.

    `runs` are, per anchor, the first of the `rest` to assign and how many; `counts` its centres.
    """
    unit, begins, count = normalize(x, dim=1), starts_of(counts), np.asarray(counts)
    sums, members = x.new_zeros(len(centres), x.shape[1]), x.new_zeros(len(centres), 1)
    for part in portions(runs[1] * (x.shape[1] + max(counts)), LIMIT):
        stack = Stack(runs[0][part], runs[1][part], x.device)
        targets = Stack(begins[part], count[part], x.device)
        rows, centre = stack.of(rest), targets.of(centres)
        nearest = masked(unit[rows] @ unit[centre].mT, targets.lengths, -torch.inf).argmax(2)
        labels = stack.flat(nearest + tokens.table(begins[part])[:, None])
        rows = stack.flat(rows)
        sums.index_add_(0, labels, x[rows])
        members.index_add_(0, labels, x.new_ones(len(rows), 1))
    return sums, members
