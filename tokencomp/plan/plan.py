"""Plans: which reducer acts before which layer or tower block, and what fraction it keeps.

Plans and stages, with `tokencomp.plan.counts`, are the only code that converts fractions to token
counts. All of it is plain Python, without tensors.
"""

from __future__ import annotations

import bisect
import itertools
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from tokencomp.errors import OptionError, PlanError
from tokencomp.plan.counts import Place
from tokencomp.plan.reducer import AnyReducer
from tokencomp.plan.stages import Stage, TowerStage

if TYPE_CHECKING:
    from tokencomp.tokens.signals import Signal
    from tokencomp.tokens.spans import ModelFacts, VisualSpan

LEAST = 1e-9
"""A fraction so small that only mandatory tokens (special tokens and one patch) remain."""


@dataclass(frozen=True)
class Plan:
    """Stages in ascending layer order, with non-increasing fractions.

    Attributes
    ----------
    stages
        Of the decoder.
    tower
        The stage in the vision tower, which comes before all of them; None: the tower sees all.

    Raises
    ------
    PlanError
        Another order, or a reducer that acts on whole spans only, after a stage that drops tokens.
    OptionError
        A stage that merges together with a reducer that merges by itself.
    """

    stages: tuple[Stage, ...] = ()
    tower: TowerStage | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "stages", tuple(self.stages))
        for modality in {modality for s in self.stages for modality, _ in s.by_modality}:
            self._check_fractions(modality)
        self._check_fractions(None)
        mergers = [s.reducer.name for s in self.stages if s.reducer.traits.merges]
        if self.may_merge and mergers:
            raise OptionError(
                f"merge=True with {mergers[0]!r}, which merges tokens itself: its tokens have no "
                "weights. Merge in one of the two ways."
            )
        first = self.tower.budget if self.tower else None
        budgets = [b.tokens for b in (first, *(s.budget for s in self.stages)) if b]
        fixed = all(s.share is None for s in self.stages)
        if fixed and budgets != sorted(budgets, reverse=True):
            raise PlanError(f"stage budgets {budgets}: expected numbers that do not grow.")

    def _check_fractions(self, modality: str | None) -> None:
        """Raise `PlanError` if the stages are not in order, for one modality."""
        layers = [s.layer for s in self.stages]
        before = [("the tower stage", self.tower.fraction)] if self.tower else []
        before += [(f"the stage at layer {s.layer}", s.fraction_of(modality)) for s in self.stages]
        fractions = [1.0, *(fraction for _, fraction in before)]
        if layers != sorted(set(layers)) or any(layer < 0 for layer in layers):
            raise PlanError(f"stage layers {layers}: expected ascending, distinct, from 0 on.")
        if any(b > a + 1e-9 or b < 0 for a, b in itertools.pairwise(fractions)):
            raise PlanError(
                f"stage fractions {fractions[1:]}: expected non-increasing numbers in [0, 1]; they "
                "are relative to the uncompressed prompt, not to the previous stage."
            )
        later = self.stages if self.tower else self.stages[1:]
        for (name, fraction), stage in zip(before, later, strict=False):
            # The fraction of a budget depends on the item, so it can be below 1.
            cut = fraction < 1 or any(s.budget for s in self.stages if s.layer < stage.layer)
            cut = cut or bool(self.tower and (self.tower.budget or self.tower.decides))
            if stage.reducer.traits.grid == "whole" and cut:
                fix = "Make it the first stage"
                if self.tower:
                    fix = "Use tower_ratio=0, or a reducer that needs no whole grid, as condiv"
                raise PlanError(
                    f"stage at layer {stage.layer}: reducer {stage.reducer.name!r} compares places "
                    f"of a whole grid, and {name} drops tokens of it. {fix}."
                )

    @cached_property
    def active(self) -> bool:
        return bool(self.stages) or self.tower is not None

    @cached_property
    def has_budget(self) -> bool:
        """Whether the kept fraction of an item depends on its size, or on that of its prompt."""
        return any(s.budget is not None for s in self.stages)

    @cached_property
    def may_merge(self) -> bool:
        """Whether a stage may merge dropped tokens into kept ones."""
        return any(s.merges_some for s in self.stages)

    @cached_property
    def dropping(self) -> Plan:
        """This plan without merging."""
        return self.with_options(merge=False) if self.may_merge else self

    @cached_property
    def needs(self) -> frozenset[Signal]:
        """Signals that the reducers of decoder stages need."""
        return frozenset().union(*(s.needs for s in self.stages))

    @cached_property
    def entry(self) -> Stage | None:
        """The stage before layer 0, if any."""
        return self.stages[0] if self.stages and self.stages[0].layer == 0 else None

    @cached_property
    def layer_stages(self) -> tuple[Stage, ...]:
        return tuple(s for s in self.stages if s.layer > 0)

    def fractions(
        self, num_layers: int, modality: str | None = None, place: Place | None = None
    ) -> list[float]:
        """Fraction of the tokens of a modality that each of `num_layers` decoder layers sees.

        None: modalities to which the stages give no fraction. `place`: the item, for plans with a
        fraction per item.
        """
        current = self.tower.fraction_of(place) if self.tower else 1.0
        seen, stages = [], {s.layer: s.fraction_of(modality, place) for s in self.stages}
        for layer in range(num_layers):
            current = stages.get(layer, current)
            seen.append(current)
        return seen

    def ratio(
        self, num_layers: int, modality: str | None = None, place: Place | None = None
    ) -> float:
        """1 - mean over layers of the fraction seen: the ratio before rounding to tokens."""
        return 1.0 - sum(self.fractions(num_layers, modality, place)) / num_layers

    def check(self, num_layers: int, first: int = 1) -> None:
        """Raise `PlanError` if a stage lies outside the decoder, or between layers before `first`.

        `first` is the earliest layer stage that the model allows (`Adapter.first_layer_stage`).
        """
        early = [s.layer for s in self.stages if 0 < s.layer < first]
        if early:
            raise PlanError(
                f"stages at layers {early}: this model adds visual features to its first {first} "
                f"layers, so tokens can be dropped at entry (layer 0) or from layer {first} on. "
                f"Move the stages to layer 0 or {first}."
            )
        late = [s.layer for s in self.stages if s.layer >= num_layers]
        if late:
            raise PlanError(
                f"stages at layers {late}, but the decoder has {num_layers} layers (0 … "
                f"{num_layers - 1}). Move the stages or drop them."
            )

    def counts(self, span: VisualSpan, num_layers: int, place: Place | None = None) -> list[int]:
        """Visual tokens of `span` after each stage, non-increasing.

        Special tokens are always kept, so a late stage may be unable to keep as few as its fraction
        says. Earlier stages then keep fewer, as far as possible, so that the ratio of the plan is
        met (ours). `place`: the item, for plans with a fraction per item.
        """
        fractions = [s.fraction_of(span.modality, place) for s in self.stages]
        if place is not None:
            pairs = zip(self.stages, fractions, strict=True)
            fractions = [s.budget.of_part(f, place) if s.budget else f for s, f in pairs]
        kept = self._falling(span, fractions)
        # Usual case: rounding alone.
        target = [span.visual * f for f in fractions]
        if all(k <= t + 0.5 for k, t in zip(kept, target, strict=True)):
            return kept
        # Special tokens keep a stage above its target: interpolate between the least counts and
        # these, so that the sum over all layers meets the target.
        least = self._falling(span, [min(f, LEAST) for f in fractions])
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

        # The step with the sum nearest to the target is next to the sign change of the excess.
        above = bisect.bisect_right(range(steps + 1), 0.0, key=excess)
        nearest = min((max(0, above - 1), min(steps, above)), key=lambda step: abs(excess(step)))
        return counts_at(nearest)

    def entering(self, span: VisualSpan) -> int:
        """Visual tokens of `span` that enter the decoder: all, or those that the tower keeps.

        An upper bound if the pixels decide (`TowerStage.decides`).
        """
        return self.tower.tokens(span) if self.tower and span.modality != "audio" else span.visual

    def merging(
        self,
        span: VisualSpan,
        counts: list[int],
        place: Place | None = None,
        entering: int | None = None,
    ) -> Stage | None:
        """The first stage that merges tokens of a span that keeps `counts`; or None.

        `entering` are the tokens that reach the decoder, where the pixels decide how many.
        """
        before = self.entering(span) if entering is None else entering
        for stage, count in zip(self.stages, counts, strict=True):
            if count < before and stage.merges(span.modality, place):
                return stage
            before = count
        return None

    def _falling(self, span: VisualSpan, fractions: list[float]) -> list[int]:
        """Keep counts at these fractions, each at most the one before."""
        pairs = zip(self.stages, fractions, strict=True)
        counts = [self.entering(span), *(s.reducer.keep_count(span, f) for s, f in pairs)]
        return list(itertools.accumulate(counts, min))[1:]

    def bind(self, facts: ModelFacts) -> Plan:
        """The same stages with reducers that have loaded and checked their weights for a model."""
        tower = self.tower
        if tower is not None:
            tower = replace(tower, reducer=tower.reducer.bind(facts))
        return Plan(tuple(replace(s, reducer=s.reducer.bind(facts)) for s in self.stages), tower)

    def with_options(self, **options: Any) -> Plan:
        """The same stages with other values of some options (`StageOptions`).

        Raises
        ------
        OptionError
            A reducer of the plan does not allow one of them.
        """
        return Plan(tuple(replace(s, **options) for s in self.stages), self.tower)


def from_profile(
    profile: list[float], reducers: AnyReducer | list[AnyReducer], current: float = 1.0
) -> Plan:
    """A stage at every layer before which the fraction that layers see falls.

    Parameters
    ----------
    reducers
        One for all stages, or one per layer.
    current
        Fraction of the tokens before the first layer.
    """
    each = reducers if isinstance(reducers, list) else [reducers] * len(profile)
    stages = []
    for layer, (fraction, reducer) in enumerate(zip(profile, each, strict=True)):
        if fraction < current - 1e-12:
            stages.append(Stage(layer, max(fraction, 0.0), reducer))
            current = fraction
    return Plan(tuple(stages))
