"""Plans: which reducer acts before which decoder layer, and what fraction it leaves.

This module alone turns fractions into token counts. It is plain Python, without tensors.
"""

from __future__ import annotations

import bisect
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from tokencomp.errors import PlanError, RatioError
from tokencomp.validation import describe_type, fits

if TYPE_CHECKING:
    from tokencomp.tokens import ModelFacts, Reduction, Signal, VisualSpan, VisualTokens

MAX_RATIO = 0.95
LEAST = 1e-9
"""A fraction so small that only mandatory tokens (special tokens and one patch) remain."""


def check_ratio(ratio: float) -> float:
    """Return `ratio` as a float in [0, 1); raise `RatioError` otherwise."""
    try:
        value = float(ratio)
    except (TypeError, ValueError, OverflowError):  # of integers that no float can hold
        value = math.nan
    if not 0.0 <= value < 1.0:
        raise RatioError(
            f"ratio={ratio!r}: expected a number in [0, 1), the fraction of visual-token work to "
            "remove (0 = off, 0.75 = a quarter is left). Use e.g. ratio=0.5."
        )
    return value


def keep_count(total: int, fraction: float, special: int = 0) -> int:
    """Tokens that stay of `total` at `fraction`, ties rounded up (ours).

    Parameters
    ----------
    total
        Tokens of the uncompressed span, special ones included.
    fraction
        Fraction to keep. 0 drops the whole span; anything more leaves every special token and
        at least one patch.
    special
        How many of `total` are special.
    """
    if fraction <= 0.0 or total == 0:
        return 0
    rounded = math.floor(total * fraction + 0.5 + 1e-9)
    return min(total, max(rounded, special + (1 if total > special else 0)))


class StageReducer(ABC):
    """What a plan and the engine need of a reducer. `tokencomp.Reducer` implements it.

    Reducers make plans, and plans hold reducers. This class stands below both, so that the two
    modules do not import each other. The members are documented in `tokencomp.Reducer`.
    """

    name: ClassVar[str] = ""

    @property
    @abstractmethod
    def needs(self) -> frozenset[Signal]: ...

    @property
    @abstractmethod
    def merges(self) -> bool: ...

    @property
    @abstractmethod
    def whole_spans(self) -> bool: ...

    @property
    @abstractmethod
    def needs_grid(self) -> bool: ...

    @property
    @abstractmethod
    def own_count(self) -> bool: ...

    @property
    @abstractmethod
    def entry_only(self) -> bool: ...

    @property
    @abstractmethod
    def only_plans(self) -> bool: ...

    @abstractmethod
    def keep_count(self, span: VisualSpan, fraction: float) -> int: ...

    @abstractmethod
    def bind(self, facts: ModelFacts) -> StageReducer: ...

    @abstractmethod
    def reduced(self, tokens: VisualTokens, keep: int) -> Reduction: ...

    @abstractmethod
    def options(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Stage:
    """From decoder layer `layer` on, `fraction` of the uncompressed visual tokens is left.

    Attributes
    ----------
    layer
        0 is the entry stage, before the first decoder layer.
    fraction
        Relative to the *uncompressed* prompt, not to what an earlier stage has left.
    reducer
        The reducer that chooses the tokens.

    Raises
    ------
    PlanError
        A layer or fraction of another type; something that is not a reducer; a reducer that only
        plans the steps of others (a preset or a composition); or a stage between layers for a
        reducer that was trained for the entry.
    """

    layer: int
    fraction: float
    reducer: StageReducer

    def __post_init__(self) -> None:
        for name, hint in {"layer": int, "fraction": float}.items():
            if not fits(value := getattr(self, name), hint):
                raise PlanError(f"stage: {name}={value!r}; expected {describe_type(hint)}.")
        if not isinstance(self.reducer, StageReducer):
            raise PlanError(
                f"stage: reducer={self.reducer!r}; expected a reducer. Build it with "
                'make_reducer, e.g. make_reducer("merge").'
            )
        if self.reducer.only_plans:
            raise PlanError(
                f"stage: reducer {self.reducer.name!r} only plans the steps of others. Give it to "
                "patch(reducer=...), or use the stages that its plan(ratio, num_layers) makes."
            )
        if self.layer > 0 and self.reducer.entry_only:
            raise PlanError(
                f"stage at layer {self.layer}: reducer {self.reducer.name!r} was trained on what "
                "stands before the first layer. Move the stage to layer 0, or take another reducer."
            )


@dataclass(frozen=True)
class Plan:
    """Stages in ascending layer order, with non-increasing fractions.

    Raises
    ------
    PlanError
        Objects that are not stages; another order; or a reducer that acts on whole spans only,
        after a stage that drops tokens.
    """

    stages: tuple[Stage, ...] = ()

    def __post_init__(self) -> None:
        stages = self.stages
        if not isinstance(stages, tuple | list) or not all(isinstance(s, Stage) for s in stages):
            raise PlanError(
                f"plan of {stages!r}; expected a tuple of Stage objects. Their JSON form is for "
                "patch(plan=...) or plan_from_json."
            )
        object.__setattr__(self, "stages", tuple(stages))
        layers = [s.layer for s in self.stages]
        fractions = [1.0, *(s.fraction for s in self.stages)]
        if layers != sorted(set(layers)) or any(layer < 0 for layer in layers):
            raise PlanError(f"stage layers {layers}: expected ascending, distinct, from 0 on.")
        if any(b > a + 1e-9 or b < 0 for a, b in itertools.pairwise(fractions)):
            raise PlanError(
                f"stage fractions {fractions[1:]}: expected non-increasing numbers in [0, 1]; they "
                "are relative to the uncompressed prompt, not to the previous stage."
            )
        for before, stage in itertools.pairwise(self.stages):
            if stage.reducer.whole_spans and before.fraction < 1:
                raise PlanError(
                    f"stage at layer {stage.layer}: reducer {stage.reducer.name!r} compares places "
                    f"of a whole grid, but the stage at layer {before.layer} leaves "
                    f"{before.fraction:g} of it. Make it the first stage."
                )

    @property
    def entry(self) -> Stage | None:
        """The stage before layer 0, if any."""
        return self.stages[0] if self.stages and self.stages[0].layer == 0 else None

    @property
    def layer_stages(self) -> tuple[Stage, ...]:
        return tuple(s for s in self.stages if s.layer > 0)

    def fractions(self, num_layers: int) -> list[float]:
        """Fraction of visual tokens seen by each of `num_layers` decoder layers."""
        seen, current, stages = [], 1.0, {s.layer: s.fraction for s in self.stages}
        for layer in range(num_layers):
            current = stages.get(layer, current)
            seen.append(current)
        return seen

    def ratio(self, num_layers: int) -> float:
        """1 - mean over layers of the fraction seen: the ratio before rounding to tokens."""
        return 1.0 - sum(self.fractions(num_layers)) / num_layers

    def check(self, num_layers: int, first: int = 1) -> None:
        """Raise `PlanError` if a stage lies outside the decoder, or between layers before `first`.

        `first` is the earliest layer stage that the model allows (`Adapter.first_layer_stage`).
        """
        early = [s.layer for s in self.stages if 0 < s.layer < first]
        if early:
            raise PlanError(
                f"stages at layers {early}: this model adds visual features to its first {first} "
                f"layers, so tokens can leave at entry (layer 0) or from layer {first} on. Move "
                f"the stages to layer 0 or {first}."
            )
        late = [s.layer for s in self.stages if s.layer >= num_layers]
        if late:
            raise PlanError(
                f"stages at layers {late}, but the decoder has {num_layers} layers (0 … "
                f"{num_layers - 1}). Move the stages or drop them."
            )

    def not_before(self, first: int, num_layers: int) -> Plan:
        """The plan without a layer stage before `first`, at the same ratio (ours).

        Layers before `first` see the entry fraction, and later layers see less to make up for it.
        If those would lose more than half of what they see, tokens leave at entry instead.
        """
        if not any(0 < s.layer < first for s in self.stages):
            return self
        by_layer = {s.layer: s.reducer for s in self.stages}
        reducers = [self.stages[0].reducer]
        for layer in range(num_layers):
            reducers.append(by_layer.get(layer, reducers[-1]))
        return _stages_at_changes(_delayed(self.fractions(num_layers), first), reducers[1:])

    def counts(self, span: VisualSpan, num_layers: int) -> list[int]:
        """Visual tokens of `span` left after each stage, non-increasing.

        Special tokens always stay, so a late stage may be unable to go as low as its fraction
        says. The earlier stages then keep fewer tokens, as far as they can, so that the ratio of
        the plan is met (ours).
        """
        kept = list(self._falling(span, [s.fraction for s in self.stages]))
        least = list(self._falling(span, [min(s.fraction, LEAST) for s in self.stages]))
        target = [span.visual * s.fraction for s in self.stages]
        if not any(k == m > t + 0.5 for k, m, t in zip(kept, least, target, strict=True)):
            return kept
        ends = [*(s.layer for s in self.stages[1:]), num_layers]
        layers = [end - s.layer for end, s in zip(ends, self.stages, strict=True)]
        steps = max(k - m for k, m in zip(kept, least, strict=True))

        def counts_at(step: int) -> list[int]:
            """Counts at `step` of `steps` equal steps from `least` up to `kept`."""
            pairs = zip(kept, least, strict=True)
            return [m + ((k - m) * step + steps // 2) // max(1, steps) for k, m in pairs]

        def excess(step: int) -> float:
            """Tokens above the target, summed over all layers; it grows with `step`."""
            rows = zip(layers, counts_at(step), target, strict=True)
            return sum(n * (count - t) for n, count, t in rows)

        # The step whose sum over all layers is nearest to the target is one of the two around
        # the sign change of the excess.
        above = bisect.bisect_right(range(steps + 1), 0.0, key=excess)
        nearest = min((max(0, above - 1), min(steps, above)), key=lambda step: abs(excess(step)))
        return counts_at(nearest)

    def _falling(self, span: VisualSpan, fractions: list[float]) -> Iterator[int]:
        """Keep counts at these fractions, none above the one before."""
        current = span.visual
        for stage, fraction in zip(self.stages, fractions, strict=True):
            current = min(current, stage.reducer.keep_count(span, fraction))
            yield current

    def bind(self, facts: ModelFacts) -> Plan:
        """The same stages with reducers that have found and checked their weights for a model."""
        return Plan(tuple(replace(s, reducer=s.reducer.bind(facts)) for s in self.stages))


def _delayed(profile: list[float], first: int) -> list[float]:
    """A profile with the mean of `profile` and no change at layers 1 … first - 1."""
    head, tail, total = profile[0], profile[first:], sum(profile)
    later = sum(tail)
    if later > 0:
        scale = (total - first * head) / later
        if scale >= 0.5:
            return [head] * first + [scale * f for f in tail]
        scale = total / (first * tail[0] + later)
        if scale * tail[0] <= 1.0:
            return [scale * tail[0]] * first + [scale * f for f in tail]
    return [total / len(profile)] * len(profile)


def from_profile(profile: list[float], reducer: StageReducer) -> Plan:
    """Turn the fraction seen by each layer into a plan with a stage at every change."""
    return _stages_at_changes(profile, [reducer] * len(profile))


def _stages_at_changes(profile: list[float], reducers: list[StageReducer]) -> Plan:
    """A stage at every layer where `profile` falls, with the reducer listed for that layer."""
    stages, current = [], 1.0
    for layer, (fraction, reducer) in enumerate(zip(profile, reducers, strict=True)):
        if fraction < current - 1e-12:
            stages.append(Stage(layer, max(fraction, 0.0), reducer))
            current = fraction
    return Plan(tuple(stages))
