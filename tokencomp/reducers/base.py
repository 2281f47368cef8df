"""The contract of a reducer. One method is one file with one subclass of `Reducer`."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from typing import Any, ClassVar

from torch import Tensor

from tokencomp.errors import OptionError, PlanError
from tokencomp.plan.counts import check_ratio, keep_count
from tokencomp.plan.plan import Plan
from tokencomp.plan.reducer import Traits, unused_options
from tokencomp.plan.stages import Stage
from tokencomp.reducers._batch import best_rows, finite_values
from tokencomp.tokens.kept import Kept
from tokencomp.tokens.signals import Signal
from tokencomp.tokens.spans import ModelFacts, VisualSpan
from tokencomp.tokens.tokens import Tokens
from tokencomp.validation import check_effect, check_types


@dataclasses.dataclass(frozen=True)
class Reducer(ABC):  # noqa: B024  # presets have no step, and can be built
    """Base class: a frozen dataclass whose fields are its options in Python, JSON and the CLI.

    A reducer has no state and does not know at which stage it acts. A subclass implements `reduce`;
    a preset, which only plans others, does not. One that acts between layers overrides `plan`.
    Options must fit their annotations; a `__post_init__` that checks more calls
    `super().__post_init__()`; an option that others make useless says so in its metadata
    (`tokencomp.plan.reducer.effective`).

    Eight members are all: `name`, `summary`, `traits`, `needs`; `reduce`, `plan`, `keep_count`,
    `bind`. `Published` adds what tables and stored answers say of a method that has a paper.

    Attributes
    ----------
    name
        Registry name.
    summary
        One line for `tokencomp list`, with the source.
    traits
        What is always true of the method, see `Traits`. A subclass that overrides `reduce` or
        `scores` is `batched` only if it sets its own traits.
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
        check_effect(label(self), self, unused_options(self, pixels=True))

    @property
    def needs(self) -> frozenset[Signal]:
        """Signals that the engine must supply in `Tokens` beyond features and grids."""
        return frozenset()

    def reduce(self, tokens: Tokens) -> Kept:
        """Choose (and possibly rewrite) of every span of `tokens` exactly its budget.

        `tokens` has one span, unless the reducer is `batched`.
        """
        raise OptionError(f"reducer {self.name!r} is a preset: it has a plan but no own step.")

    def plan(self, ratio: float, num_layers: int) -> Plan:
        """Stages that remove `ratio` of the visual-token work of a `num_layers` decoder."""
        ratio = check_ratio(ratio)
        return Plan((Stage(0, 1.0 - ratio, self),)) if ratio > 0 else Plan()

    def keep_count(self, span: VisualSpan, fraction: float) -> int:
        """Visual tokens left of `span` by a stage that leaves `fraction` of it.

        Plans ask it for every stage, in the engine and in servers alike (`Plan.counts`).
        """
        return keep_count(span.visual, fraction, len(span.special))

    def bind(self, facts: ModelFacts) -> Reducer:
        """This reducer for one model. Trained reducers find and check their weights in it.

        Raises
        ------
        WeightsError
            Weights are missing, damaged, or of another model.
        """
        return self


@dataclasses.dataclass(frozen=True)
class ScoreReducer(Reducer):
    """Base class of methods that are a score and a top-k: a subclass implements `scores` alone.

    Of equal scores the lower index is kept.
    """

    @abstractmethod
    def scores(self, tokens: Tokens) -> Tensor:
        """Importance of every patch.

        Parameters
        ----------
        tokens
            One span, or, if its traits say `batched`, all spans of a call: take means and
            maxima within each of the `tokens.lengths`.

        Returns
        -------
        Tensor, shape (n,)
            Finite; compared in float32.
        """

    def reduce(self, tokens: Tokens) -> Kept:
        scores = finite_values(self.scores(tokens), "scores")
        return Kept(best_rows(scores, tokens.budgets, tokens.lengths))


def reduced(reducer: Reducer, tokens: Tokens) -> Kept:
    """What a reducer keeps of the patches of a call.

    Raises
    ------
    PlanError
        It returned something that `Kept.check` refuses, or it needs patches that are missing.
    """
    from tokencomp.kernels.dispatch import checked

    if reducer.traits.grid == "whole":
        tokens.check_whole(label(reducer))
    if reducer.traits.batched:
        with checked():  # a reducer of batches looks at its input once, see `finite_features`
            return _typed(reducer, reducer.reduce(tokens)).check(tokens, label(reducer))
    parts = [_typed(reducer, reducer.reduce(t)).check(t, label(reducer)) for t in tokens]
    return parts[0] if len(parts) == 1 else Kept.joined(parts, tokens)


def _typed(reducer: Reducer, kept: object) -> Kept:
    if isinstance(kept, Kept):
        return kept
    raise PlanError(
        f"reducer {label(reducer)!r} returned a {type(kept).__name__}. "
        "`reduce(tokens)` must return a tokencomp.Kept."
    )


def counts_itself(reducer: Reducer) -> bool:
    """Whether it leaves a fixed number of tokens, whatever the ratio."""
    return type(reducer).keep_count is not Reducer.keep_count


def label(reducer: Reducer) -> str:
    """How messages name a reducer."""
    return reducer.name or type(reducer).__name__
