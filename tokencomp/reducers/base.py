"""The contract of a reducer: its base classes, what it is given, and what it returns.

The engine calls `reduced`.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from tokencomp.errors import OptionError, PlanError, ScoreError
from tokencomp.plan.counts import check_ratio
from tokencomp.plan.options import Traits, unused_options
from tokencomp.plan.plan import Plan, Stage, keep_count
from tokencomp.tokens.signals import TOWER_ATTENTION, Signal, TowerSignal
from tokencomp.tokens.tokens import Kept, ModelFacts, Tokens, VisualSpan
from tokencomp.validation import check_effect, check_ranges, check_types

MISSING = "reducer {!r} needs {}. Run it through tokencomp.patch."


@dataclasses.dataclass(frozen=True)
class Reducer(ABC):  # noqa: B024  # it can be built without `reduce`
    """Base class of all methods: a frozen dataclass whose fields are its options.

    A reducer has no state and does not know at which stage it acts. Methods override `reduce` (what
    is kept at one stage) or `plan` (at which layers). Options are checked against their
    annotations; a `__post_init__` that checks more calls `super().__post_init__()` first. An option
    without effect under some values of the others says so in its metadata
    (`tokencomp.plan.options.effective`).

    The eight public members are `name`, `summary`, `traits`, `needs`, `reduce`, `plan`,
    `keep_count` and `bind`. `Published` adds what evaluation tables need to know of a method with a
    paper.

    Attributes
    ----------
    name
        Registry name.
    summary
        One line for `tokencomp list`, with the source.
    traits
        What is always true of the method, see `Traits`. A subclass that overrides `reduce` or
        `scores` must set its traits again to be `batched`.
    """

    name: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    traits: ClassVar[Traits] = Traits()
    _has_step: ClassVar[bool] = False

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if vars(cls).keys() & {"reduce", "scores"}:
            cls._has_step = True
            if "traits" not in vars(cls):
                cls.traits = dataclasses.replace(cls.traits, batched=False)

    def __post_init__(self) -> None:
        check_types(label(self), self)
        check_ranges(label(self), self)
        unused = unused_options(self, pixels=True)
        nowhere = unused_options(self, pixels=False).keys() & unused.keys()
        check_effect(label(self), self, {name: unused[name] for name in nowhere})

    @property
    def needs(self) -> frozenset[Signal]:
        """Signals beyond features and grids that the engine must compute."""
        return frozenset()

    def reduce(self, tokens: Tokens) -> Kept:
        """Choose, and possibly merge: exactly `tokens.budgets[i]` patches of every span i.

        `tokens` holds one span, or all spans of a call if the traits say `batched`.
        """
        raise OptionError(
            f"reducer {self.name!r} plans stages of other reducers, and keeps nothing itself. Use "
            "it through patch, or run the reducers of its plan."
        )

    def plan(self, ratio: float, num_layers: int) -> Plan:
        """Stages after which layers see `1 - ratio` of the visual tokens on average."""
        ratio = check_ratio(ratio)
        return Plan((Stage(0, 1.0 - ratio, self),)) if ratio > 0 else Plan()

    def keep_count(self, span: VisualSpan, fraction: float) -> int:
        """Keep count: how many visual tokens of `span` a stage with this `fraction` keeps.

        `Plan.counts` asks this in the engine and in servers, so both keep equally many.
        """
        return keep_count(span.visual, fraction, len(span.special))

    def bind(self, facts: ModelFacts) -> Reducer:
        """This reducer for one model. Trained reducers load their weights here.

        Raises
        ------
        WeightsError
            Weights are missing, damaged, or of another model.
        """
        return self


@dataclasses.dataclass(frozen=True)
class ScoreReducer(Reducer):
    """Base class of methods that are a score and a top-k: a subclass implements `scores` alone.

    Of equal scores the lower row is kept.
    """

    @abstractmethod
    def scores(self, tokens: Tokens) -> Tensor:
        """Importance of every patch.

        Parameters
        ----------
        tokens
            One span, or all spans of a call if the traits say `batched`: then take means and maxima
            within each of `tokens.lengths`.

        Returns
        -------
        Tensor, shape (n,)
            Finite; compared in float32.
        """

    def reduce(self, tokens: Tokens) -> Kept:
        from tokencomp.kernels import topk_stable

        scores, wanted = self.scores(tokens), (len(tokens.features),)
        if getattr(scores, "shape", None) != wanted:
            raise PlanError(
                f"reducer {label(self)!r} returned scores of {form(scores)}. `scores(tokens)` must "
                f"return one score per patch, a tensor of shape {wanted}."
            )
        try:
            scores = finite_values(scores, "scores")
        except ScoreError:
            for value in (tokens.features, tokens.scores, *tokens.tower.values()):
                if value is not None:
                    finite_values(value, "features and scores")  # raises for what came in
            raise ScoreError(
                f"reducer {label(self)!r} returned scores with NaN or infinity for finite "
                "features. Correct its `scores`."
            ) from None
        return Kept(topk_stable(scores, tokens.budgets, spans=tokens.lengths, trusted=True))


# -- what a reducer is given, and top-k -----------------------------------------------------------


def supplied_scores(tokens: Tokens, reducer: str) -> Tensor:
    """Attention scores that the engine computed for `Reducer.needs`, float32 (n,), not checked.

    `ScoreError` without them.
    """
    if tokens.scores is None:
        raise ScoreError(MISSING.format(reducer, "attention scores"))
    return tokens.scores.float()


def tower_signal(tokens: Tokens, signal: TowerSignal, reducer: str) -> Tensor:
    """The signal of the vision tower, (n,) or (n, heads, head_dim); `ScoreError` without it."""
    if signal not in tokens.tower:
        raise ScoreError(MISSING.format(reducer, f"{signal.part} of the vision tower"))
    return tokens.tower[signal]


def salient(tokens: Tokens, reducer: str) -> tuple[Tensor, Tensor]:
    """Features (n, d) and `TOWER_ATTENTION` (n,) in float32, both checked to be finite."""
    attention = tower_signal(tokens, TOWER_ATTENTION, reducer)
    return finite_features(tokens.features, attention).float(), attention


def finite_values(values: Tensor, what: str) -> Tensor:
    """Return `values` in float32; `what` names them in the `ScoreError` if some are not finite."""
    values = values.float()
    # One device read: a sum with NaN or an infinity is never finite.
    if math.isfinite(values.detach().sum().item()):
        return values
    bad = ~torch.isfinite(values)
    if bad.any():
        raise ScoreError(
            f"{int(bad.sum())} of {values.numel()} {what} are NaN or infinite: features or "
            "attention logits have overflowed. Run the model in bfloat16 or float32."
        )
    return values


def finite_features(x: Tensor, scores: Tensor | None = None) -> Tensor:
    """Return the features x (n, d) unchanged; raise `ScoreError` if they or `scores` are not
    finite.

    Both are checked with one read from the device: a sum with NaN or an infinity is never finite.
    """
    # L2 norms in float32: squares of finite float16 features can overflow.
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    norms = torch.linalg.vector_norm(x, dim=1, dtype=wide)
    total = norms.detach().sum()
    if scores is not None:
        total = total + scores.detach().sum()
    if not math.isfinite(total.item()):
        finite_values(norms, "feature norms")
        if scores is not None:
            finite_values(scores, "scores")
    return x


def best_rows(scores: Tensor, counts: Sequence[int], lengths: Sequence[int]) -> Tensor:
    """Top-k per span: rows of the `counts` largest scores (n,) of every span, ascending.

    Of equal scores the lower row is kept.
    """
    from tokencomp.kernels import topk_stable

    rows: Tensor = topk_stable(scores, counts, spans=lengths)
    return rows


# -- what it returns -------------------------------------------------------------------------------


def reduced(reducer: Reducer, tokens: Tokens) -> Kept:
    """Run a reducer on the patches of a call, and check what it returns.

    Stages call this within `kernels.dispatch.exact`. Kernels do not check the input of a `batched`
    reducer again: `finite_features` has read it. `PlanError` if the result is no valid `Kept`, or
    if patches that the reducer needs are missing.
    """
    if reducer.traits.grid == "whole":
        tokens.check_whole(label(reducer))
    parts = []
    for one in [tokens] if reducer.traits.batched else tokens:
        kept = reducer.reduce(one)
        if fault := _fault(kept, one, reducer.traits.decides):
            raise PlanError(
                f"reducer {label(reducer)!r} returned {fault}. `reduce(tokens)` must return "
                "`Kept(patches)` with numbers of its patches, int64, ascending, exactly as many of "
                "every span as its budget, and as many `features` and `weights`."
            )
        parts.append(kept)
    return parts[0] if len(parts) == 1 else Kept.joined(parts, tokens)


def _fault(kept: object, tokens: Tokens, decides: bool) -> str:
    """What is wrong with the result of a reducer, or "".

    It must be patches of `tokens`, of every span its budget; a reducer that `decides` (`Traits`)
    keeps any number of at least one. The numbers are checked on the CPU only: on a GPU the host
    would have to wait.
    """
    if not isinstance(kept, Kept):
        return f"a {type(kept).__name__}"
    if getattr(kept.patches, "dtype", None) != torch.int64 or kept.patches.ndim != 1:
        return f"patches of {form(kept.patches)}"
    # One entry of every table per kept patch, as many as the budgets say.
    k = len(kept.patches) if decides else sum(tokens.budgets)
    wanted = {"patches": (k,), "features": (k, tokens.features.shape[1]), "weights": (k,)}
    for name, shape in wanted.items():
        values = getattr(kept, name)
        if values is not None and getattr(values, "shape", None) != shape:
            return f"{name} of {form(values)} where shape {shape} was expected"
    if kept.patches.device.type != "cpu":
        return ""
    # Ascending patches of the spans, of every span its budget.
    rows, stops = kept.patches.numpy(), np.cumsum(tokens.lengths)
    if (np.diff(rows) <= 0).any():
        return "patches that are not ascending"
    if len(rows) and (rows[0] < 0 or rows[-1] >= stops[-1]):
        return f"patches {rows[0]} … {rows[-1]} of {stops[-1]}"
    counts = np.diff(np.searchsorted(rows, stops), prepend=0)
    budgets = np.maximum(counts, 1) if decides else np.asarray(tokens.budgets)
    wrong = np.flatnonzero(counts != budgets)
    if len(wrong):
        return f"{counts[wrong[0]]} patches of a span where {budgets[wrong[0]]} were requested"
    return ""


def form(values: object) -> str:
    """Shape and type of what should be a tensor, for messages."""
    if isinstance(values, Tensor):
        return f"shape {tuple(values.shape)} and type {values.dtype}"
    return f"type {type(values).__name__}"


def counts_itself(reducer: Reducer) -> bool:
    """Whether it keeps a fixed number of tokens, whatever the ratio."""
    return type(reducer).keep_count is not Reducer.keep_count


def label(reducer: Reducer) -> str:
    """The name of a reducer in messages."""
    return reducer.name or type(reducer).__name__
