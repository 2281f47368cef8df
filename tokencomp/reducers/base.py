"""The contract of a reducer. One method is one file with one subclass of `Reducer`."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from typing import ClassVar

from torch import Tensor

from tokencomp.plan.counts import check_ratio
from tokencomp.plan.plan import Plan
from tokencomp.plan.reducer import StageReducer, label
from tokencomp.plan.stages import Stage
from tokencomp.reducers._batch import best_rows, finite_values
from tokencomp.tokens.kept import Kept
from tokencomp.tokens.spans import ModelFacts
from tokencomp.tokens.tokens import Tokens
from tokencomp.validation import check_effect, check_types


@dataclasses.dataclass(frozen=True)
class Reducer(StageReducer):
    """Base class: a frozen dataclass whose fields are its options in Python, JSON and the CLI.

    A reducer has no state and does not know at which stage it acts. A subclass implements `reduce`.
    It sees one span, or, if the class says `batched = True`, all spans of a call, to treat them
    with one launch per step; what is chosen in a span must not depend on the others. One that acts
    between layers overrides `plan`. Options must fit their annotations; a `__post_init__` that
    checks more calls `super().__post_init__()`; options that others make useless belong into
    `unused_options`, so that nobody sets them in vain. What is always true of a method is a class
    attribute (`merges = True`); what depends on an option is a property.

    What else one may ask about a reducer is a function: in `tokencomp.plan.reducer`, and
    `options_of`. `Published` adds what tables and stored answers say of a method that has a paper.

    Attributes
    ----------
    name
        Registry name.
    summary
        One line for `tokencomp list`, with the source.
    per_item
        True: what is kept of a media item depends on that item, its budget and the options alone.
        The author of a class outside of this package says so to let servers run it, which share
        cached items between requests.
    """

    summary: ClassVar[str] = ""
    per_item: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_types(label(self), self)
        check_effect(label(self), self, self.unused_options(pixels=True))

    def plan(self, ratio: float, num_layers: int) -> Plan:
        """Stages that remove `ratio` of the visual-token work of a `num_layers` decoder."""
        ratio = check_ratio(ratio)
        return Plan((Stage(0, 1.0 - ratio, self),)) if ratio > 0 else Plan()

    def bind(self, facts: ModelFacts) -> Reducer:
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
            One span, or, if the class says `batched = True`, all spans of a call: take means and
            maxima within each of the `tokens.lengths`.

        Returns
        -------
        Tensor, shape (n,)
            Finite; compared in float32.
        """

    def reduce(self, tokens: Tokens) -> Kept:
        scores = finite_values(self.scores(tokens), "scores")
        return Kept(best_rows(scores, tokens.budgets, tokens.lengths))
