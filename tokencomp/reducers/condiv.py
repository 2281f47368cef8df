"""Conditional diversity: relevance × distance from what is already kept. Ours."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from tokencomp.plan.counts import split_evenly
from tokencomp.reducers._batch import Patches, previous_similarity, segment, spread
from tokencomp.reducers._merging import merge_dropped
from tokencomp.reducers._rows import finite_features, round_to_sum, supplied_scores
from tokencomp.reducers.base import Reducer
from tokencomp.reducers.registry import register_reducer
from tokencomp.reducers.selector import Selector
from tokencomp.tokens.reduction import Reduction
from tokencomp.tokens.signals import TOWER_ATTENTION, Attention, Signal
from tokencomp.tokens.spans import ModelFacts, SpanBatch
from tokencomp.validation import check_range, field_types

SignalName = Literal["attention", "selector", "vit_attention", "norm", "novelty", "none"]
SIGNALS: tuple[SignalName, ...] = get_args(SignalName)
FLOOR = 1e-3
STILL_POWER, VIDEO_POWER = 0.35, 1.0  # chosen on validation: docs/decisions/0001-default-reducer.md


@register_reducer("condiv")
@dataclass(frozen=True)
class ConDiv(Reducer):
    r"""Greedy choice of tokens that are unlike those already kept and, on videos, relevant.

    .. math:: next = \arg\max_i \; r_i^p \cdot (m \bar d + \min_{j \in kept} (1 - \cos(x_i, x_j)))

    On images, unless a power is given, it is the greedy k-centre of `kcentre` instead, which reads
    no attention. Attention alone keeps many copies of one thing, and diversity alone keeps
    outliers; the product does neither. With a margin, the second and third of several similar
    things (objects to be counted, for instance) still rank above faint background. Ours; related to
    DivPrune (arXiv 2503.02175) and CDPruner (arXiv 2506.10967).

    Attributes
    ----------
    power
        p, 0 to 8; 0 is plain max-min diversity. None depends on the kind of media. On videos it is
        1: what happens again looks like what is already kept, so that relevance has to speak for
        it. On images attention has no part, because that of early layers leans towards the end of a
        picture (arXiv 2412.13180): tokens are compared by the root mean square of their
        differences, as in `kcentre`, and `margin`, `centred` and `frames` have no effect. On audio,
        and on images under any other signal, it is 0.35.
        "auto": 2·(1 - H(r) / log n), H the entropy of r as shares: relevance that is spread evenly
        gets p = 0, so that diversity alone decides; relevance that is concentrated on a single
        token gets p = 2.
    signal
        What r is. "attention": layer 0's attention of the text after the span, mean over heads
        and tokens. "selector": the output of the trained network of `selector` for that row, as
        shares. "vit_attention": attention received in the vision tower's last block but one
        (see `tokencomp.engine.tower.signals`), question-agnostic.
        "norm": length of the feature. "novelty":
        1 - cosine with the same place of the frame before (1 in the first frame; videos, at
        entry). "none": r = 1.
    margin
        m, 0 to 8: share of the span's mean distance d̄ (over all pairs, those of a token with
        itself included) that is added to every distance. Without effect where r = 1.
    centred
        Subtract the span's mean feature before the cosine.
    frames
        How the budget of a video is spread. "pooled": one greedy choice over all frames. "equal",
        "novelty": a greedy choice inside every frame, whose budget is an equal share or its share
        of the novelty (as in `signal`, mean over the frame); centring is then by frame. On images
        the three are the same.
    merge_rest
        Kept tokens become the mean of themselves and the dropped tokens nearest to them, of
        cosine at least this (-1: of all of them); None leaves kept tokens as they are. With
        `patch(..., proportional_attention=True)` a mean counts in attention as often as the tokens
        it stands for, so that the background keeps its share of the attention.
    weights
        Of the selector, see there. Used by the signal "selector" only.

    Raises
    ------
    WeightsError
        On `patch`, with signal "selector": no weights, or weights of another model.

    Notes
    -----
    Relevance is divided by its largest value and floored at 1e-3, so that the distance matters at
    every p.
    """

    power: float | Literal["auto"] | None = None
    signal: SignalName = "attention"
    margin: float = 0.2
    centred: bool = False
    frames: Literal["pooled", "equal", "novelty"] = "pooled"
    merge_rest: float | None = None
    weights: str | None = None

    summary = "greedy: k-centre on images, relevance × diversity on videos (ours)"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.power is not None and self.power != "auto":
            check_range("condiv", "power", self.power, 0, 8)
        check_range("condiv", "margin", self.margin, 0, 8)
        if self.merge_rest is not None:
            check_range("condiv", "merge_rest", self.merge_rest, -1, 1)

    def idle(self, pixels: bool) -> dict[str, str]:
        idle = {}
        if self.signal == "none":
            idle["power"] = "with signal='none', which is 1 at every power"
        elif self.power == 0:
            idle["signal"] = "with power=0"
        if self.weighted_by == "none":
            idle["margin"] = "where all tokens are equally relevant (signal='none' or power=0)"
        if self.weighted_by != "selector":
            idle["weights"] = "without signal='selector', which alone reads them"
        return idle

    @property
    def weighted_by(self) -> SignalName:
        """The signal that has an effect: at power 0 none has."""
        return "none" if self.power == 0 else self.signal

    @property
    def needs(self) -> frozenset[Signal]:
        signals: dict[str, Signal] = {
            "attention": Attention("text"),
            "selector": Attention("text"),
            "vit_attention": TOWER_ATTENTION,
        }
        uses = self.weighted_by in signals
        return frozenset({signals[self.weighted_by]}) if uses else frozenset()

    def needs_for(self, kinds: Collection[str]) -> frozenset[Signal]:
        return frozenset() if all(map(self._by_looks, kinds)) else self.needs

    @property
    def revision(self) -> int:
        """Since revision 2 images are compared by looks alone where no power is given."""
        return 2 if self.power is None and self.signal == "attention" else 1

    @property
    def merges(self) -> bool:
        return self.merge_rest is not None

    @property
    def entry_only(self) -> bool:
        return self.weighted_by == "selector"

    @property
    def needs_grid(self) -> bool:
        return self.whole_spans or self.signal == "selector" or self.frames != "pooled"

    @property
    def whole_spans(self) -> bool:
        return "novelty" in (self.weighted_by, self.frames)

    def bind(self, facts: ModelFacts) -> ConDiv:
        if self.weighted_by != "selector":
            return self
        selector = self.selector.bind(facts)
        options = {**self.options(), "weights": selector.weights}
        return BoundConDiv(**options, bound_selector=selector)

    @property
    def selector(self) -> Selector:
        """The trained reducer whose network makes relevance of an attention row."""
        return Selector(self.weights)

    def reduce_batch(self, batch: SpanBatch, keeps: Sequence[int]) -> Reduction:
        patches = self._patches(batch, keeps)
        looks = [self._by_looks(kind) for kind in batch.kinds]
        parts = []
        if any(looks):
            parts.append(_centres(_only(patches, looks)))
        if not all(looks):
            parts.append(self._relevant(_only(patches, [not one for one in looks])))
        chosen = parts[0] if len(parts) == 1 else torch.cat(parts).sort().values
        if self.merge_rest is None:
            return patches.kept(chosen)
        return merge_dropped(patches, chosen, self.merge_rest, self.centred)

    def _by_looks(self, kind: str) -> bool:
        """Whether tokens of this kind of media are compared without relevance."""
        return kind == "image" and self.power is None and self.signal == "attention"

    def _relevant(self, patches: Patches) -> Tensor:
        """Patches that are chosen by relevance and distance, ascending."""
        from tokencomp.kernels import maxmin_select, mean_distance

        scores = None
        if self.weighted_by in ("attention", "vit_attention", "selector"):
            scores = patches.of_patches(supplied_scores(patches.batch, "condiv"))
        x = finite_features(patches.features, scores)
        weights = self._weights(patches, x, scores)
        parts, counts = self._problems(patches, x)
        lengths = [n for own in parts for n in own]
        margin = None  # under equal weights a margin would change no choice
        if self.margin and weights is not None:
            margin = self.margin * mean_distance(x, self.centred, spans=patches.lengths)
            if len(lengths) > len(parts):
                margin = spread(margin, [len(own) for own in parts]).expand(len(lengths))
        how = {"spans": lengths, "centred": self.centred, "margin": margin}
        chosen: Tensor = maxmin_select(x, counts, weights, **how)
        return chosen

    def _patches(self, batch: SpanBatch, keeps: Sequence[int]) -> Patches:
        of = Patches.of
        return Patches.whole(batch, keeps, "condiv") if self.whole_spans else of(batch, keeps)

    def _problems(self, patches: Patches, x: Tensor) -> tuple[list[list[int]], list[int]]:
        """Patches of the problems of every span, and how many to keep: the span, or its frames."""
        grids = patches.batch.grids
        if self.frames == "pooled" or all(t == 1 for t, _, _ in grids):
            return [[n] for n in patches.lengths], patches.budgets
        lengths, counts = patches.per_frame(), []
        lengths = [
            [sum(own)] if t == 1 else own for own, (t, _, _) in zip(lengths, grids, strict=True)
        ]
        if self.frames == "equal":
            for own, budget in zip(lengths, patches.budgets, strict=True):
                counts += split_evenly(budget, own)
            return lengths, counts
        every = novelty(patches, x).double().tolist()
        for start, own, budget in zip(patches.starts, lengths, patches.budgets, strict=True):
            news = (
                torch.tensor(every[start : start + sum(own)], dtype=torch.float64)
                .view(len(own), -1)
                .mean(1)
            )
            shares = (budget * news / news.sum()).tolist()
            counts += [budget] if len(own) == 1 else round_to_sum(shares, budget, own[0])
        return lengths, counts

    def _weights(self, patches: Patches, x: Tensor, scores: Tensor | None) -> Tensor | None:
        """Relevance to the power p of every patch, float32; None if all are equal.

        Parameters
        ----------
        scores : Tensor of float32, shape (patches,), or None
            What the engine supplied, for the signals that need it.
        """
        if self.weighted_by == "none":
            return None
        lengths, owners = patches.lengths, None
        if len(lengths) > 1:
            owners = patches.owners()
        if scores is not None:
            relevance = scores
        elif self.signal == "norm":
            relevance = x.float().norm(dim=1)
        else:
            relevance = novelty(patches, x)
        if self.signal == "selector":
            logits = self.selector.importances(patches, relevance)
            most = spread(segment(logits, lengths, "max"), lengths, owners)
            shares = (logits - most).exp()
            relevance = shares / spread(segment(shares, lengths, "sum"), lengths, owners)
        relevance = relevance.clamp(min=0)
        most = segment(relevance, lengths, "max").clamp(min=1e-30)
        relevance = relevance / spread(most, lengths, owners)
        power: Any = self.power
        if power == "auto":
            power = spread(concentration(relevance, lengths, owners), lengths, owners)
        elif power is None:
            power = usual_power(patches, relevance, owners)
        return relevance.clamp(min=FLOOR).pow(power)


@dataclass(frozen=True)
class BoundConDiv(ConDiv):
    """ConDiv for one model, with the selector whose weights were checked."""

    bound_selector: Selector = field(default_factory=Selector, repr=False, compare=False)

    @property
    def selector(self) -> Selector:
        return self.bound_selector

    def options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in field_types(ConDiv)}


def _only(patches: Patches, chosen: list[bool]) -> Patches:
    """The same patches with a budget of 0 for the spans that are not chosen."""
    if all(chosen):
        return patches
    budgets = [n if one else 0 for n, one in zip(patches.budgets, chosen, strict=True)]
    return replace(patches, budgets=budgets)


def _centres(patches: Patches) -> Tensor:
    """Patches of a greedy k-centre, ascending: see `KCentre`."""
    from tokencomp.kernels import maxmin_select

    x = finite_features(patches.features)
    chosen: Tensor = maxmin_select(x, patches.budgets, spans=patches.lengths, metric="rms")
    return chosen


def concentration(relevance: Tensor, lengths: list[int], owners: Tensor | None) -> Tensor:
    """2·(1 - H / log n) of the n shares of every span: 0 if all are equal, 2 if one has all."""
    total = segment(relevance, lengths, "sum").clamp(min=1e-30)
    share = relevance / spread(total, lengths, owners)
    entropy = segment(torch.special.entr(share), lengths, "sum")
    most = torch.tensor([math.log(max(n, 2)) for n in lengths], device=relevance.device)
    return 2 * (1 - entropy / most).clamp(min=0)


def usual_power(patches: Patches, relevance: Tensor, owners: Tensor | None) -> Tensor | float:
    """The power of every patch by its kind of media; a number where all have the same."""
    powers = [VIDEO_POWER if kind == "video" else STILL_POWER for kind in patches.batch.kinds]
    if len({*powers}) == 1:
        return powers[0]
    return spread(relevance.new_tensor(powers), patches.lengths, owners)


def novelty(patches: Patches, x: Tensor) -> Tensor:
    """1 - cosine of every patch with the same place of the frame before; 1 in the first frame."""
    return (1 - previous_similarity(patches, x)).clamp(max=1.0)
