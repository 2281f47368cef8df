"""The contract of a reducer. One method is one file with one subclass of `Reducer`."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from tokencomp.plan.counts import check_ratio
from tokencomp.plan.plan import Plan
from tokencomp.plan.reducer import StageReducer, label
from tokencomp.plan.stages import Stage
from tokencomp.tokens.spans import ModelFacts
from tokencomp.validation import check_effect, check_types


@dataclasses.dataclass(frozen=True)
class Reducer(StageReducer):
    """Base class: a frozen dataclass whose fields are its options in Python, JSON and the CLI.

    A reducer has no state and does not know at which stage it acts. A subclass implements `reduce`,
    which sees one span, or `reduce_batch`, which sees all spans of a call and treats them with one
    launch per step; either gives the other. What is chosen in a span must not depend on the other
    spans. One that acts between layers overrides `plan`. Options must fit their annotations; a
    `__post_init__` that checks more calls `super().__post_init__()`; options that others make
    useless belong into `unused_options`, so that nobody sets them in vain. What is always true of a
    method is a class attribute (`merges = True`); what depends on an option is a property.

    Thirteen members are all: `name`, `summary`, `per_item`; `needs`, `merges`, `grid`,
    `entry_only`, `unused_options`; `plan`, `keep_count`, `bind`; `reduce`, `reduce_batch`. What
    else one may ask about a reducer stands beside it: in `tokencomp.plan.reducer`, and
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
