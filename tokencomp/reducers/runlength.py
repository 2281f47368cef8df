"""Run length in time: drop what still looks as it did when it was last kept."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokencomp.reducers._pixels import appearance
from tokencomp.reducers._rows import keep_patches, whole_grid
from tokencomp.reducers.base import Reducer
from tokencomp.reducers.registry import register_reducer
from tokencomp.reduction import Reduction
from tokencomp.tokens import VisualTokens
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
    take frames one by one (LLaVA, InternVL, SmolVLM and VILA).

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
    whole_spans = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self.name, "first", self.first, 0, 1)
        check_range(self.name, "thumb", self.thumb, 1, 64)

    def reduce(self, tokens: VisualTokens, keep: int) -> Reduction:
        from tokencomp.kernels import maxmin_select, topk_stable

        t, h, w = tokens.grid
        rows, budget = whole_grid(tokens, keep, self.name)
        x = appearance(tokens.features[rows], tokens.pixels, self.thumb)
        if t == 1:
            return keep_patches(tokens, rows[maxmin_select(x, budget, metric="rms")])
        later = (t - 1) * h * w  # places of the other frames, which may be too few for their share
        first = min(h * w, max(1, int(budget * self.first), budget - later))
        start = maxmin_select(x[: h * w], first, metric="rms")
        rest = budget - first
        others = topk_stable(_changes(x.view(t, h * w, -1), rest), rest)
        return keep_patches(tokens, rows[torch.cat([start, others + h * w])])


def _changes(frames: Tensor, budget: int) -> Tensor:
    """Scores of the tokens behind the first frame; the best `budget` are those that changed.

    Parameters
    ----------
    frames : Tensor, shape (t, places, d)

    Returns
    -------
    Tensor of float32, shape ((t - 1) · places,)
        Distance to the token last kept at the place; those above the smallest threshold that
        `budget` tokens or fewer exceed come before all others.
    """
    low = frames.new_zeros(())
    high = (frames[1:] - frames[:1]).square().mean(-1).sqrt().max() * 2 + 1
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        fits = _distances(frames, middle)[1].sum() <= budget  # stays on the device
        low, high = torch.where(fits, low, middle), torch.where(fits, middle, high)
    distances, changed = _distances(frames, high)
    return torch.where(changed, distances + distances.max() + 1, distances).flatten()


def _distances(frames: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
    """Distances to the token last kept at each place, and which exceed the threshold."""
    reference, distances, changed = frames[0], [], []
    for frame in frames[1:]:
        distance = (frame - reference).square().mean(-1).sqrt()
        above = distance > threshold
        reference = torch.where(above[:, None], frame, reference)
        distances.append(distance)
        changed.append(above)
    return torch.stack(distances), torch.stack(changed)
