"""The method spec: a reducer with its options at a ratio, or an explicit plan.

Python calls, the command line, evaluation, training and servers pass this one type around.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from tokencomp.engine.proportional import check_merges
from tokencomp.errors import OptionError
from tokencomp.plan import Plan, check_ratio
from tokencomp.reducers.base import Reducer
from tokencomp.reducers.registry import make_reducer

DEFAULT_REDUCER = "condiv"  # chosen on validation data: docs/decisions/0001-default-reducer.md
DEFAULT_SERVED_REDUCER = "divprune"  # ignores the question, so media caches serve every question
Engine = Literal["hf", "server"]


def resolve_auto(reducer: str | Reducer, engine: Engine = "hf") -> str | Reducer:
    """The reducer that "auto" stands for under an engine; every other value unchanged.

    Parameters
    ----------
    engine
        "hf": a patched model in this process. "server": a server that may reuse the media of one
        request for the question of another.
    """
    if not isinstance(reducer, str) or reducer != "auto":
        return reducer
    return DEFAULT_REDUCER if engine == "hf" else DEFAULT_SERVED_REDUCER


@dataclass(frozen=True)
class MethodSpec:
    """A method at a ratio. Hashable, and equal to every spec with equal fields.

    Attributes
    ----------
    reducer
        A registered name, two of them ("merge+prune"), a `Reducer`, or "auto".
    ratio
        Fraction of visual-token work to remove, in [0, 1); 0 is off.
    options
        Options of the named reducer.
    plan
        Explicit stages instead of a reducer and its options.
    proportional_attention
        Whether a merged token weighs as much as the tokens it stands for.

    Raises
    ------
    RatioError, UnknownNameError, OptionError
        A bad ratio, reducer name or option; a plan beside a reducer or options; proportional
        attention for a reducer that merges nothing.
    """

    reducer: str | Reducer = "auto"
    ratio: float = 0.0
    options: dict[str, Any] = field(default_factory=dict)
    plan: Plan | None = None
    proportional_attention: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "ratio", check_ratio(self.ratio))
        conflicts = [] if self.reducer == "auto" else [f"reducer={self.reducer!r}"]
        conflicts += [f"{name}={value!r}" for name, value in self.options.items()]
        if self.plan is not None and conflicts:
            raise OptionError(
                f"plan=... together with {', '.join(conflicts)}: a plan names its reducers, with "
                "their options, in its stages. Leave out the plan, or everything else."
            )
        reducer = self.built_reducer if self.plan is None and self.names_reducer else None
        if self.proportional_attention:
            check_merges(self.plan or Plan(), reducer)

    @property
    def names_reducer(self) -> bool:
        """Whether `reducer` names or is a reducer; subclasses allow further names."""
        return True

    @cached_property
    def built_reducer(self) -> Reducer:
        """The reducer object with its options, "auto" resolved for a patched model."""
        return make_reducer(resolve_auto(self.reducer), **self.options)

    @property
    def active(self) -> bool:
        """Whether the spec removes anything."""
        return self.ratio > 0

    @cached_property
    def _plans(self) -> dict[tuple[int, int], Plan]:
        return {}

    def stages(self, num_layers: int, first_layer_stage: int) -> Plan:
        """The plan for a decoder: the explicit one, or the reducer's schedule at `ratio`.

        Parameters
        ----------
        num_layers
            Decoder layers.
        first_layer_stage
            Earliest layer before which the model allows a stage between layers.
        """
        if self.plan is not None:
            return self.plan
        key = num_layers, first_layer_stage
        if key not in self._plans:
            plan = self.built_reducer.plan(self.ratio, num_layers)
            self._plans[key] = plan.not_before(first_layer_stage, num_layers)
        return self._plans[key]

    def changed(
        self,
        ratio: float | None,
        reducer: str | Reducer | None,
        plan: Plan | None,
        options: dict[str, Any],
    ) -> MethodSpec:
        """The spec after `Handle.set` with these arguments; None and {} change nothing."""
        keep: dict[str, Any] = {"proportional_attention": self.proportional_attention}
        if plan is not None:
            if ratio is not None:
                raise OptionError(two_ratios(ratio))
            return MethodSpec(reducer or "auto", self.ratio, options, plan, **keep)
        new_ratio = self.ratio if ratio is None else ratio
        if reducer is not None:
            return MethodSpec(reducer, new_ratio, options, **keep)
        if self.plan is not None and (ratio is not None or options):
            raise OptionError(
                "the current stages come from plan=..., so there is no reducer that could plan for "
                "another ratio or option. Give set(reducer=...) too, or a new plan."
            )
        return dataclasses.replace(self, ratio=new_ratio, options={**self.options, **options})

    def describe(self) -> dict[str, Any]:
        """Plain form with every option of the reducer; the same for all inactive specs."""
        if not self.active:
            return {"ratio": 0.0}
        options = self.built_reducer.options()
        return {"reducer": self.built_reducer.name, "ratio": self.ratio, "options": options}

    def __hash__(self) -> int:
        options = json.dumps(self.options, sort_keys=True, default=str)
        return hash((self.reducer, self.ratio, options, self.plan))


def two_ratios(ratio: float) -> str:
    """The message for a plan beside a ratio."""
    return f"plan=... together with ratio={ratio!r}: a plan has its own fractions. Leave one out."
