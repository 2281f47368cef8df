"""Plans whose stages leave of every item, or modality, what a method leaves at its ratio."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from tokencomp.plan.budgets import Budget
from tokencomp.plan.plan import Plan
from tokencomp.plan.profiles import not_before
from tokencomp.plan.reducer import StageReducer
from tokencomp.plan.stages import Stage

PROBES = tuple(i / 50 for i in range(1, 50))
"""Ratios at which a method is asked before which layers it cuts."""
MOST_SOLVED = 1024


class Planner(Protocol):
    """A reducer that plans, `tokencomp.Reducer`."""

    def plan(self, ratio: float, num_layers: int) -> Plan: ...


def by_item(budget: Budget, method: Planner, num_layers: int, first: int) -> Plan:
    """The plan that gives every item the schedule of its own ratio.

    Hooks are installed before it is known how large an item is, so the plan has a stage before
    every layer before which the method cuts at some ratio. Where an item's own schedule has none,
    its count stays the same.

    Parameters
    ----------
    first
        Earliest layer before which the model allows a stage between layers.
    """
    schedule = Schedule(method, num_layers, first)
    reducers: dict[int, StageReducer] = {}
    for ratio in PROBES:
        reducers |= {s.layer: s.reducer for s in schedule.plan(1.0 - ratio).stages}
    layers = sorted(reducers)
    if layers == [0]:
        return Plan((Stage(0, 1.0, reducers[0], budget=budget),))
    ends = [*layers[1:], num_layers]
    return Plan(
        tuple(
            Stage(a, 1.0, reducers[a], budget=budget, share=Share(schedule, a, b))
            for a, b in zip(layers, ends, strict=True)
        )
    )


def by_modality(ratios: Mapping[str, float], method: Planner, num_layers: int, first: int) -> Plan:
    """The stages of all modalities in one plan; modalities without a ratio see every layer."""
    plans = {
        modality: not_before(method.plan(ratio, num_layers), first, num_layers)
        for modality, ratio in ratios.items()
    }
    profiles = {modality: plan.fractions(num_layers) for modality, plan in plans.items()}
    reducers = {s.layer: s.reducer for plan in plans.values() for s in plan.stages}
    return Plan(
        tuple(
            Stage(layer, 1.0, reducer, tuple((k, f[layer]) for k, f in profiles.items()))
            for layer, reducer in sorted(reducers.items())
        )
    )


@dataclass(frozen=True)
class Schedule:
    """A method's schedule in one decoder, solved once for every ratio that occurs."""

    method: Planner
    num_layers: int
    first: int
    _solved: dict[float, list[float]] = field(default_factory=dict, compare=False, repr=False)

    def plan(self, left: float) -> Plan:
        """The plan under which all layers see the fraction `left` on average."""
        plan = self.method.plan(1.0 - left, self.num_layers)
        return not_before(plan, self.first, self.num_layers)

    def seen(self, left: float) -> list[float]:
        """Fraction that every layer then sees."""
        if left not in self._solved:
            if len(self._solved) > MOST_SOLVED:
                self._solved.clear()
            self._solved[left] = self.plan(left).fractions(self.num_layers)
        return self._solved[left]


@dataclass(frozen=True)
class Share:
    """From the fraction that all layers see on average to what layers `start … stop - 1` see.

    A step of the schedule between these layers is spread over them, so that the average stays.
    """

    schedule: Schedule
    start: int
    stop: int

    def __call__(self, left: float) -> float:
        seen = self.schedule.seen(left)[self.start : self.stop]
        return sum(seen) / len(seen)
