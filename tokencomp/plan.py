"""Plans: which reducer acts at which decoder layer and what fraction it leaves.

The only place where fractions become token counts. Everything here is plain Python.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from tokencomp.errors import PlanError, RatioError

if TYPE_CHECKING:
    from torch import nn

    from tokencomp.reducers.base import Reducer
    from tokencomp.tokens import Grid, VisualSpan

MAX_RATIO = 0.95
LEAST = 1e-9
"""A fraction that leaves what has to stay of a span."""


def check_ratio(ratio: float) -> float:
    """Return `ratio` as a float in [0, 1); raise `RatioError` otherwise."""
    try:
        value = float(ratio)
    except (TypeError, ValueError):
        value = math.nan
    if not 0.0 <= value < 1.0:
        raise RatioError(
            f"ratio={ratio!r}: expected a number in [0, 1), the fraction of visual-token work to "
            "remove (0 = off, 0.75 = a quarter is left). Use e.g. ratio=0.5."
        )
    return value


def count(total: int, fraction: float, special: int = 0) -> int:
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
    wanted = math.floor(total * fraction + 0.5 + 1e-9)
    return min(total, max(wanted, special + (1 if total > special else 0)))


def kept_count(grid: Grid, ratio: float, special: int = 0) -> int:
    """Tokens that stay of one span at entry: a pure function of grid and ratio.

    Raises
    ------
    RatioError
        `ratio` is not in [0, 1).
    """
    return count(math.prod(grid) + special, 1.0 - check_ratio(ratio), special)


@dataclass(frozen=True)
class Stage:
    """From decoder layer `layer` on, `fraction` of the uncompressed visual tokens is left.

    layer 0 is the entry stage; `fraction` is relative to the *uncompressed* prompt.

    Raises
    ------
    PlanError
        A layer or fraction of another type; no `Reducer`, one without a step of its own (a preset
        or a composition), or between layers one that was trained for the entry.
    """

    layer: int
    fraction: float
    reducer: Reducer

    def __post_init__(self) -> None:
        from tokencomp.reducers._options import fits, told
        from tokencomp.reducers.base import Reducer  # which imports this module

        for name, hint in {"layer": int, "fraction": float}.items():
            if not fits(value := getattr(self, name), hint):
                raise PlanError(f"stage: {name}={value!r}; expected {told(hint)}.")
        if not isinstance(self.reducer, Reducer):
            raise PlanError(
                f"stage: reducer={self.reducer!r}; expected a reducer. Build it with "
                'make_reducer, e.g. make_reducer("merge").'
            )
        if type(self.reducer).reduce is Reducer.reduce:
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
        No stages, or in another order; a reducer that acts on whole spans only, behind a stage that
        drops tokens.
    """

    stages: tuple[Stage, ...] = ()

    def __post_init__(self) -> None:
        given = self.stages
        if not isinstance(given, tuple | list) or not all(isinstance(s, Stage) for s in given):
            raise PlanError(
                f"plan of {given!r}; expected a tuple of Stage objects. Their JSON form is for "
                "patch(plan=...) or plan_from_json."
            )
        object.__setattr__(self, "stages", tuple(given))
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
        """The plan with no layer stage before `first`, and the same ratio (ours).

        Layers before `first` keep the entry fraction and later ones pay for it; if that would cost
        those more than half of what they see, tokens leave at entry instead.
        """
        if not any(0 < s.layer < first for s in self.stages):
            return self
        wanted = _delayed(self.fractions(num_layers), first)
        by_layer = {s.layer: s.reducer for s in self.stages}
        stages, current, reducer = [], 1.0, self.stages[0].reducer
        for layer, fraction in enumerate(wanted):
            reducer = by_layer.get(layer, reducer)
            if fraction < current - 1e-12:
                stages.append(Stage(layer, fraction, reducer))
                current = fraction
        return Plan(tuple(stages))

    def counts(self, span: VisualSpan, num_layers: int) -> list[int]:
        """Visual tokens of `span` left after each stage, non-increasing.

        Where a late stage cannot go as low as it should, because special tokens stay, the earlier
        ones pay for it as far as they can, so that the ratio of the plan is met (ours).
        """
        kept = list(self._falling(span, [s.fraction for s in self.stages]))
        least = list(self._falling(span, [min(s.fraction, LEAST) for s in self.stages]))
        wanted = [span.visual * s.fraction for s in self.stages]
        if not any(k == m > w + 0.5 for k, m, w in zip(kept, least, wanted, strict=True)):
            return kept
        ends = [*(s.layer for s in self.stages[1:]), num_layers]
        layers = [end - s.layer for end, s in zip(ends, self.stages, strict=True)]
        steps = max(k - m for k, m in zip(kept, least, strict=True))

        def left(step: int) -> list[int]:
            """Counts `step` of `steps` steps above the least."""
            pairs = zip(kept, least, strict=True)
            return [m + ((k - m) * step + steps // 2) // max(1, steps) for k, m in pairs]

        def over(step: int) -> float:
            """How far these exceed what all layers together should see."""
            return sum(n * (c - w) for n, c, w in zip(layers, left(step), wanted, strict=True))

        first_over = bisect.bisect_right(range(steps + 1), 0.0, key=over)
        return left(
            min((max(0, first_over - 1), min(steps, first_over)), key=lambda s: abs(over(s)))
        )

    def _falling(self, span: VisualSpan, fractions: list[float]) -> Iterator[int]:
        """Counts at these fractions, none above the one before."""
        current = span.visual
        for stage, fraction in zip(self.stages, fractions, strict=True):
            current = min(current, stage.reducer.span_count(span, fraction))
            yield current

    def for_model(self, model: nn.Module) -> Plan:
        """The same stages with reducers that have found and checked their weights for `model`."""
        ready = (replace(s, reducer=s.reducer.for_model(model)) for s in self.stages)
        return Plan(tuple(ready))


def _delayed(old: list[float], first: int) -> list[float]:
    """A profile with the mean of `old` and no change at layers 1 … first - 1."""
    head, tail, total = old[0], old[first:], sum(old)
    paid = sum(tail)
    if paid > 0:
        scale = (total - first * head) / paid
        if scale >= 0.5:
            return [head] * first + [scale * f for f in tail]
        scale = total / (first * tail[0] + paid)
        if scale * tail[0] <= 1.0:
            return [scale * tail[0]] * first + [scale * f for f in tail]
    return [total / len(old)] * len(old)


def from_profile(profile: list[float], reducer: Reducer) -> Plan:
    """Turn the fraction seen by each layer into a plan with a stage at every change."""
    stages, current = [], 1.0
    for layer, fraction in enumerate(profile):
        if fraction < current - 1e-12:
            stages.append(Stage(layer, max(fraction, 0.0), reducer))
            current = fraction
    return Plan(tuple(stages))
