"""Run length in time: drop what still looks as it did when it was last kept."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tokencomp.reducers._batch import Patches, by_group
from tokencomp.reducers._pixels import NO_PIXELS, appearance
from tokencomp.reducers.base import Reducer
from tokencomp.reducers.registry import register_reducer
from tokencomp.tokens.reduction import Reduction
from tokencomp.tokens.spans import Grid, SpanBatch
from tokencomp.validation import check_range

HALVINGS = 24  # of the interval that holds the threshold: to 6e-8 of the largest distance


@register_reducer("runlength")
@dataclass(frozen=True)
class RunLength(Reducer):
    """Keep a token of a video where its place looks unlike the token last kept there.

    As in RLT (arXiv 2411.05222), but every distance is taken to the token last *kept* at the place,
    so that slow changes add up, and the threshold is the one that meets the budget: counts stay
    exact. The first frame gets at most the share `first` of the budget, by k-centre, because with
    small budgets a whole first frame would be all (ours).

    k-centre chooses the tokens of an image, and those of single video frames in vision towers that
    take frames one by one (LLaVA, InternVL, SmolVLM and VILA). Distances are those of averages of
    pixels, without contrast and change.

    Attributes
    ----------
    first : float
        Largest share of the budget that the first frame gets, in (0, 1].
    thumb : int
        See `kcentre`.
    """

    first: float = 0.5
    thumb: int = 4

    summary = (
        "drop tokens that look like the last kept one at their place (RLT 2411.05222, exact count)"
    )
    grid = "whole"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self.name, "first", self.first, 0, 1)
        check_range(self.name, "thumb", self.thumb, 1, 64)

    def idle(self, pixels: bool) -> dict[str, str]:
        return {} if pixels else {"thumb": NO_PIXELS}

    def reduce_batch(self, batch: SpanBatch, keeps: Sequence[int]) -> Reduction:
        from tokencomp.kernels import maxmin_select, topk_stable

        patches = Patches.whole(batch, keeps, self.name)
        x = appearance(patches.features, batch.pixels, self.thumb)
        pairs = list(zip(batch.grids, patches.budgets, strict=True))
        heads = [h * w for _, h, w in batch.grids]
        rows = [np.arange(at, at + n) for at, n in zip(patches.starts, heads, strict=True)]
        first = None if heads == patches.lengths else patches.table(np.concatenate(rows))
        budgets = [self._of_first(grid, budget) for grid, budget in pairs]
        seen = x if first is None else x.index_select(0, first)
        chosen = maxmin_select(seen, budgets, spans=heads, metric="rms")
        if first is None:
            return patches.kept(chosen)
        rest = [budget - own for budget, own in zip(patches.budgets, budgets, strict=True)]
        scores = by_group(patches, batch.grids, functools.partial(_changes, batch.grids, rest), x)
        scores.index_fill_(0, first.index_select(0, chosen), torch.inf)
        return patches.kept(topk_stable(scores, patches.budgets, spans=patches.lengths))

    def _of_first(self, grid: Grid, budget: int) -> int:
        """How many tokens of the first frame stay: all of them in an image."""
        t, h, w = grid
        later = (t - 1) * h * w  # places of the other frames, which may be too few for their share
        return min(h * w, max(1, int(budget * self.first), budget - later))


def _changes(grids: list[Grid], budgets: list[int], members: list[int], x: Tensor) -> Tensor:
    """Scores of the tokens of spans with one grid; -inf in first frames.

    Parameters
    ----------
    grids, budgets
        Of all spans: the grid, and how many tokens behind the first frame stay.
    members
        The spans that `x` belongs to.
    x : Tensor, shape (members · t · places, d)

    Returns
    -------
    Tensor of float32, shape (members · t · places,)
        Distance to the token last kept at the place. Tokens that changed by more than a threshold
        come first. The threshold is the smallest that at most the budget's tokens exceed.
    """
    t, h, w = grids[members[0]]
    frames = x.view(len(members), t, h * w, -1)
    scores = frames.new_full((len(members), t, h * w), -torch.inf)
    if t == 1:
        return scores.flatten()
    most = torch.tensor([budgets[m] for m in members]).to(x.device)
    low = frames.new_zeros(len(members))
    high = (frames[:, 1:] - frames[:, :1]).square().mean(-1).sqrt().amax((1, 2)) * 2 + 1
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        fits = _distances(frames, middle)[1].sum((1, 2)) <= most  # stays on the device
        low, high = torch.where(fits, low, middle), torch.where(fits, middle, high)
    distances, changed = _distances(frames, high)
    highest = distances.amax((1, 2), keepdim=True)
    scores[:, 1:] = torch.where(changed, distances + highest + 1, distances)
    return scores.flatten()


def _distances(frames: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
    """Distances to the token last kept at each place, and which exceed the threshold.

    Parameters
    ----------
    frames : Tensor, shape (spans, t, places, d)
    threshold : Tensor, shape (spans,)

    Returns
    -------
    Tensor of float32 and Tensor of bool, shape (spans, t - 1, places)
    """
    reference, distances, changed = frames[:, 0], [], []
    for frame in frames[:, 1:].unbind(1):
        distance = (frame - reference).square().mean(-1).sqrt()
        above = distance > threshold[:, None]
        reference = torch.where(above[..., None], frame, reference)
        distances.append(distance)
        changed.append(above)
    return torch.stack(distances, 1), torch.stack(changed, 1)
