"""Run length in time: drop what still looks as it did when it was last kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from tokencomp.reducers import Kept, Reducer, Tokens, Traits, best_rows, register_reducer
from tokencomp.reducers._pixels import OF_PIXELS
from tokencomp.reducers.kcenter import descriptor
from tokencomp.tokens.tokens import Grid
from tokencomp.validation import between

HALVINGS = 24  # of the interval that holds the threshold: to 6e-8 of the largest distance


@register_reducer("runlength")
@dataclass(frozen=True)
class RunLength(Reducer):
    """Keep a token of a video where its place looks unlike the token last kept there.

    As in RLT (arXiv 2411.05222), but every distance is taken to the token last *kept* at the place,
    so that slow changes add up, and the threshold is the one that meets the budget: counts stay
    exact. The first frame gets at most half of the budget, by k-center, because with small budgets
    a whole first frame would be all (ours).

    k-center chooses the tokens of an image, and those of single video frames in vision towers that
    take frames one by one (LLaVA, InternVL, SmolVLM and VILA). Distances are those of averages of
    pixels, without contrast and change.

    Attributes
    ----------
    pool : int
        See `kcenter`.
    """

    pool: int = field(default=4, metadata=OF_PIXELS | between(1, 64))

    summary = (
        "drop tokens that look like the last kept one at their place (RLT 2411.05222, exact count)"
    )
    traits = Traits(grid="whole", batched=True)

    def reduce(self, tokens: Tokens) -> Kept:
        from tokencomp.kernels import maxmin_select

        x, grids = descriptor(tokens, self.pool), tokens.grids
        heads = [h * w for _, h, w in grids]
        rows = [np.arange(at, at + n) for at, n in zip(tokens.starts, heads, strict=True)]
        first = None if heads == tokens.lengths else tokens.table(np.concatenate(rows))
        budgets = [*map(of_first, grids, tokens.budgets)]
        seen = x if first is None else x.index_select(0, first)
        chosen: Tensor = maxmin_select(seen, budgets, spans=heads, metric="rms")
        if first is None:
            return Kept(chosen)
        rest = [budget - own for budget, own in zip(tokens.budgets, budgets, strict=True)]
        scores = changes(tokens, x, rest)
        scores.index_fill_(0, first.index_select(0, chosen), torch.inf)
        return Kept(best_rows(scores, tokens.budgets, tokens.lengths))


def of_first(grid: Grid, budget: int) -> int:
    """Keep count of the first frame: all of its tokens in an image."""
    t, h, w = grid
    later = (t - 1) * h * w  # places of the other frames, which may be too few for their share
    return min(h * w, max(1, budget // 2, budget - later))


def changes(tokens: Tokens, x: Tensor, budgets: list[int]) -> Tensor:
    """Distance of every patch to the token last kept at its place, by x (n, d), shape (n,).

    Tokens that changed by more than a threshold come first, first frames have -inf. The threshold
    of a span is the smallest that at most its budget of tokens after the first frame exceeds.
    """
    # Step by step, and in a step longest videos first: places of the others come to an end.
    lengths, grids = tokens.lengths, np.asarray(tokens.grids)
    span = np.repeat(np.arange(len(grids)), lengths)
    step = (np.arange(len(x)) - np.repeat(tokens.starts, lengths)) // grids[span, 1:].prod(1)
    order, sizes = np.lexsort((-grids[span, 0], step)), np.bincount(step).tolist()
    rows, owner = tokens.table(order), tokens.table(span[order[sizes[0] :]])
    first, *frames = x[rows].split(sizes)

    def largest(values: Tensor) -> Tensor:
        return values.new_zeros(len(grids)).scatter_reduce_(0, owner, values, "amax")

    start = torch.cat([frame - first[: len(frame)] for frame in frames])
    low, most = x.new_zeros(len(grids)), tokens.table(budgets)
    high = largest(start.square().mean(-1).sqrt()) * 2 + 1
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        changed = distances(first, frames, middle[owner])[1]
        fits = torch.zeros_like(low).index_add_(0, owner, changed.float()) <= most
        low, high = torch.where(fits, low, middle), torch.where(fits, middle, high)
    distance, changed = distances(first, frames, high[owner])
    found = torch.where(changed, distance + largest(distance)[owner] + 1, distance)
    return x.new_full((len(x),), -torch.inf).index_copy_(0, rows[sizes[0] :], found)


def distances(
    reference: Tensor, frames: Sequence[Tensor], threshold: Tensor
) -> tuple[Tensor, Tensor]:
    """Distances to the token last kept at each place, and which exceed the threshold, both (n,).

    `reference` (places, d) are first frames, `frames` those after, n tokens in all, of the first
    places alone where videos have ended.
    """
    found, changed = [], []
    for frame, limit in zip(frames, threshold.split([*map(len, frames)]), strict=True):
        reference = reference[: len(frame)]
        found.append((frame - reference).square().mean(-1).sqrt())
        changed.append(found[-1] > limit)
        reference = torch.where(changed[-1][:, None], frame, reference)
    return torch.cat(found), torch.cat(changed)
