"""Conditional diversity: relevance × distance from what is already kept. Ours."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from tokencomp.reducers._options import check_range
from tokencomp.reducers._rows import (
    finite_rows,
    frame_counts,
    given_scores,
    joined,
    merge_into,
    share,
    split,
    whole,
    whole_grid,
)
from tokencomp.reducers.base import Reducer, check_choice, register_reducer
from tokencomp.reducers.selector import Selector
from tokencomp.tokens import TOWER_ATTENTION, Attention, Reduction, Signal, VisualTokens

SIGNALS = ("attention", "selector", "vit_attention", "norm", "novelty", "none")
FLOOR = 1e-3
FRAMES = ("pooled", "equal", "novelty")


@register_reducer("condiv")
@dataclass(frozen=True)
class ConDiv(Reducer):
    r"""Greedy choice of tokens that are relevant and unlike those already kept.

    .. math:: next = \arg\max_i \; r_i^p \cdot (m \bar d + \min_{j \in kept} (1 - \cos(x_i, x_j)))

    Attention alone keeps many copies of one thing, diversity alone keeps outliers; the product does
    neither. With a margin the second and third of several like things (to be counted, say) still
    rank above faint background. Ours; kin: DivPrune (arXiv 2503.02175), CDPruner (2506.10967).

    Attributes
    ----------
    power
        p, 0 to 8; 0 is plain max-min diversity. "auto": 2·(1 - H(r) / log n), H the entropy of r
        as shares: a row that points nowhere leaves diversity alone, one that points at single
        tokens counts squared.
    signal
        What r is. "attention": layer 0's attention of the text after the span, mean over heads
        and tokens. "selector": what the trained network of `selector` makes of that row, as
        shares. "vit_attention": attention received in the vision tower's last block but one
        (see `tokencomp.engine.tower`), question-agnostic. "norm": length of the feature. "novelty":
        1 - cosine with the same place of the frame before (1 in the first frame; videos, at
        entry). "none": r = 1.
    margin
        m, 0 to 8: share of the span's mean distance d̄ (all pairs, each token with itself too) that
        is added to every distance. Without effect where r = 1.
    centred
        Subtract the span's mean feature before the cosine.
    frames
        How the budget of a video is spread. "pooled": all frames are one problem and get what
        their tokens earn. "equal", "novelty": every frame is a problem of its own, of equal share,
        or of its share of the novelty (as the signal, mean over the frame); centring is then by
        frame. On images all are the same.
    merge_rest
        Kept tokens become the mean of themselves and the dropped tokens nearest to them, of
        cosine at least this; None leaves kept tokens as they are.
    weights
        Of the selector, as there; other signals than "selector" leave them alone.

    Raises
    ------
    WeightsError
        On `patch`, with signal "selector": no weights, or weights of another model.

    Notes
    -----
    Relevance is divided by its largest value and floored at 1e-3, so that no p silences the
    distance. Serving-safe where r is made of the features alone.
    """

    power: float | Literal["auto"] = 1.0
    signal: str = "attention"
    margin: float = 0.2
    centred: bool = False
    frames: str = "pooled"
    merge_rest: float | None = None
    weights: str | None = None

    _selector: ClassVar[Selector | None] = None  # of the model, set by `for_model`
    serving_safe_with = "signal=norm or novelty or none"
    summary = "relevance × diversity, greedy (ours)"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("condiv", "signal", self.signal, SIGNALS)
        check_choice("condiv", "frames", self.frames, FRAMES)
        if self.power != "auto":
            check_range("condiv", "power", self.power, 0, 8)
        check_range("condiv", "margin", self.margin, 0, 8)
        if self.merge_rest is not None:
            check_range("condiv", "merge_rest", self.merge_rest, -1, 1)
        object.__setattr__(self, "serving_safe", not self.needs)
        object.__setattr__(self, "merges", self.merge_rest is not None)
        object.__setattr__(self, "entry_only", self.signal == "selector" and self.power != 0)
        novel = self.signal == "novelty" and self.power != 0
        object.__setattr__(self, "whole_spans", novel or self.frames == "novelty")

    @property
    def needs(self) -> frozenset[Signal]:
        signal: dict[str, Signal] = {
            "attention": Attention("text"),
            "selector": Attention("text"),
            "vit_attention": TOWER_ATTENTION,
        }
        uses = self.signal in signal and self.power != 0
        return frozenset({signal[self.signal]}) if uses else frozenset()

    def for_model(self, model: nn.Module) -> ConDiv:
        if self.signal != "selector" or self.power == 0:
            return self
        found = Selector(self.weights).for_model(model)
        ready = replace(self, weights=found.weights)
        object.__setattr__(ready, "_selector", found)
        return ready

    def reduce(self, tokens: VisualTokens, keep: int) -> Reduction:
        from tokencomp.kernels import maxmin_select, mean_distance

        rows, special = split(tokens)
        x = tokens.features[rows]
        finite_rows(x)
        weights = self._weights(tokens, rows)
        lengths, counts = self._problems(tokens, rows.numel(), keep - special.numel())
        margin = None  # equal weights: it would change no choice
        if self.margin and weights is not None:
            margin = (self.margin * mean_distance(x, self.centred)).expand(len(lengths))
        chosen = maxmin_select(
            x, counts, weights, spans=lengths, centred=self.centred, margin=margin
        )
        if self.merge_rest is None:
            return joined(tokens, rows[chosen])
        return merge_into(tokens, rows, chosen, self.merge_rest, self.centred)

    def _problems(self, tokens: VisualTokens, n: int, keep: int) -> tuple[list[int], list[int]]:
        """Patches of every problem, and how many of them to keep: the span, or its frames."""
        if self.frames == "pooled" or tokens.grid[0] == 1:
            return [n], [keep]
        lengths = frame_counts(tokens)
        if self.frames == "equal":
            return lengths, share(keep, lengths)
        news = novelty(tokens).view(len(lengths), -1).double().mean(1)
        return lengths, whole((keep * news / news.sum()).tolist(), keep, lengths[0])

    def _weights(self, tokens: VisualTokens, rows: Tensor) -> Tensor | None:
        if self.signal == "none" or self.power == 0:
            return None
        if self.signal == "selector":
            row = given_scores(tokens, "condiv")[rows]
            relevance = (self._selector or Selector(self.weights)).importance(row).softmax(0)
        elif self.signal in ("attention", "vit_attention"):
            relevance = given_scores(tokens, "condiv")[rows]
        elif self.signal == "norm":
            relevance = tokens.features[rows].float().norm(dim=1)
        else:
            relevance = novelty(tokens)
        relevance = relevance.clamp(min=0)
        relevance = relevance / relevance.max().clamp(min=1e-30)
        power = concentration(relevance) if self.power == "auto" else self.power
        return relevance.clamp(min=FLOOR) ** power


def concentration(relevance: Tensor) -> Tensor:
    """2·(1 - H / log n) of n shares: 0 if all are equal, 2 if one has everything; a scalar."""
    share = relevance / relevance.sum().clamp(min=1e-30)
    entropy = torch.special.entr(share).sum()
    return 2 * (1 - entropy / math.log(max(len(relevance), 2))).clamp(min=0)


def novelty(tokens: VisualTokens) -> Tensor:
    """1 - cosine of every patch with the same place of the frame before; 1 in the first frame."""
    from tokencomp.kernels import nearest_previous_frame

    t, h, w = tokens.grid
    x = tokens.features[whole_grid(tokens, "condiv")]
    similarity, _ = nearest_previous_frame(x.view(t, h, w, -1))
    return (1 - similarity).flatten().clamp(max=1.0)
