"""Plans: which reducer acts before which decoder layer or tower block, and what fraction it keeps.

With `tokencomp.plan.counts`, this is the only code that converts fractions to token counts. All of
it is plain Python, without tensors.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from tokencomp.errors import OptionError, PlanError
from tokencomp.plan.counts import Budget, BudgetShare, split_evenly
from tokencomp.plan.options import AnyReducer, StageOptions, only_plans, unused_options
from tokencomp.validation import check_effect, describe_type, fits

if TYPE_CHECKING:
    from tokencomp.tokens.signals import Signal
    from tokencomp.tokens.tokens import Grid, ModelFacts, VisualSpan

MEDIA = ("image", "video", "audio")
LEAST = 1e-9
"""A fraction so small that only mandatory tokens (special tokens and one patch) remain."""


def keep_count(total: int, fraction: float, special: int = 0) -> int:
    """Keep count: how many of `total` tokens remain at `fraction`, ties rounded up (ours).

    `special` of the `total` tokens of the uncompressed span are special. A fraction of 0 drops the
    whole span; otherwise all special tokens and at least one patch are kept.
    """
    if fraction <= 0.0 or total == 0:
        return 0
    rounded = math.floor(total * fraction + 0.5 + 1e-9)
    return min(total, max(rounded, special + (1 if total > special else 0)))


@dataclass(frozen=True)
class Stage(StageOptions):
    """From decoder layer `layer` on, `fraction` of the uncompressed visual tokens is kept.

    Attributes
    ----------
    layer
        0 is the entry stage, before the first decoder layer.
    fraction
        Relative to the *uncompressed* prompt, not to the previous stage.
    reducer
        The reducer that chooses the tokens.
    by_modality
        Fractions of modalities ("image", "video", "audio") that differ from `fraction`, as sorted
        pairs.
    budget
        Instead of `fraction`: the budget of every item.
    from_mean
        For budgets: converts the item's average keep fraction over all layers to the fraction kept
        by this stage; None: they are equal.

    Its options, such as `merge`, are those of `StageOptions`; None is off.

    Raises
    ------
    PlanError
        A layer or fraction of another type; an unknown modality; a reducer that only plans
        stages of others (`aim` or a composition), or that acts before the vision tower or at the
        entry alone.
    OptionError
        An option of the reducer that has no effect there; an option of the stage that is of another
        type, or that the reducer does not allow.
    """

    layer: int
    fraction: float
    reducer: AnyReducer
    by_modality: tuple[tuple[str, float], ...] = ()
    budget: Budget | None = None
    from_mean: Callable[[float], float] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "by_modality", tuple(sorted(dict(self.by_modality).items())))
        unknown = [k for k, f in self.by_modality if k not in MEDIA or not fits(f, float)]
        if unknown:
            raise PlanError(
                f"stage: by_modality={dict(self.by_modality)!r}; expected fractions of "
                f"{', '.join(MEDIA)}."
            )
        for name, hint in {"layer": int, "fraction": float}.items():
            if not fits(value := getattr(self, name), hint):
                raise PlanError(f"stage: {name}={value!r}; expected {describe_type(hint)}.")
        if fault := _unfit_for_layer(self.reducer, self.layer):
            raise PlanError(f"stage at layer {self.layer}: reducer {self.reducer.name!r} {fault}.")
        check_effect(self.reducer.name, self.reducer, unused_options(self.reducer, pixels=False))
        for name, value in self.options_in_force.items():
            object.__setattr__(self, name, value)
        self.check_options(self.reducer)

    def fraction_of(self, modality: str | None, share: BudgetShare | None = None) -> float:
        """The fraction of a modality; None: of modalities without one.

        `share`: sizes of the item, for stages with a budget.
        """
        if self.budget is not None and share is not None:
            left = self.budget.left(share)
            return left if self.from_mean is None else self.from_mean(left)
        return dict(self.by_modality).get(modality, self.fraction) if modality else self.fraction

    @cached_property
    def needs(self) -> frozenset[Signal]:
        needs: frozenset[Signal] = self.reducer.needs
        return needs

    @property
    def most(self) -> float:
        """The largest fraction that the stage keeps of any modality."""
        return max(self.fraction, *(f for _, f in self.by_modality), 0.0)


@dataclass(frozen=True)
class TowerStage:
    """Blocks `block` and later of the vision tower see `fraction` of the cells.

    A cell is the patches that one visual token reads. A cell that the tower drops is a visual
    token that the decoder never gets.

    Attributes
    ----------
    block
        Number of the first block that sees fewer patches; 0: no block sees all patches.
    fraction
        Of the cells of every image or video, in (0, 1]. 1 for a reducer that decides by pixels
        how many cells it keeps, such as `delta`.
    budget
        Instead of `fraction`: the largest number of cells of every image or video.
    reducer
        Chooses the cells: by pixels at block 0, by hidden states at later blocks.
    frames_apart
        Whether the cells of every frame of a video are chosen by themselves, and equally many.
        Set when a model is patched: towers that take pictures as one dense batch need it.

    Raises
    ------
    PlanError
        A block or fraction of another type or range, or a reducer that cannot act in the tower:
        one that needs the question or other signals, merges, chooses the number of tokens, or
        only plans stages of others; a budget of a whole prompt.
    OptionError
        An option of the reducer that has no effect there.
    """

    block: int
    fraction: float
    reducer: AnyReducer
    frames_apart: bool = False
    budget: Budget | None = None

    def __post_init__(self) -> None:
        if not fits(self.block, int) or self.block < 0:
            raise PlanError(f"tower stage: block {self.block!r}; expected an integer from 0 on.")
        if not fits(self.fraction, float) or not 0.0 < self.fraction <= 1.0:
            raise PlanError(
                f"tower stage: fraction={self.fraction!r}; expected a number in (0, 1], the "
                "fraction of the cells that the tower keeps."
            )
        if self.budget is not None and self.budget.whole_prompt:
            raise PlanError(
                f"tower stage: {self.budget}; the tower encodes an item before the prompt is known "
                "to it. Use a budget for every item."
            )
        if self.decides and (self.block, self.fraction, self.budget) != (0, 1.0, None):
            raise PlanError(
                f"tower stage before block {self.block} with fraction={self.fraction:g}, "
                f"budget={self.budget}: the pixels decide how many cells {self.reducer.name!r} "
                "keeps. Use TowerStage(0, 1.0, reducer), and a ratio or budget in a Stage."
            )
        if fault := _unfit_for_tower(self.reducer):
            raise PlanError(
                f"tower stage: reducer {self.reducer.name!r} {fault}. Use a reducer that looks at "
                "the picture alone, such as 'kcenter', 'runlength', 'uniform' or 'random'."
            )
        check_effect(
            self.reducer.name, self.reducer, unused_options(self.reducer, pixels=self.block == 0)
        )

    @property
    def decides(self) -> bool:
        """Whether the pixels decide how many cells are kept; counts are then upper bounds."""
        return bool(self.reducer.traits.decides)

    def fraction_of(self, share: BudgetShare | None = None) -> float:
        """The fraction of the cells of an item; with a budget and without `share`: `fraction`."""
        return self.fraction if self.budget is None or share is None else self.budget.left(share)

    def cells(self, grids: list[Grid], modality: str = "image") -> list[int]:
        """Keep counts of parts that share one budget, in proportion to their size.

        Parameters
        ----------
        grids
            (t, h, w) of every part: one for a whole image or video.
        modality
            Of the parts.
        """
        sizes = [math.prod(grid) for grid in grids]
        item = tuple(sizes), 0, sum(t for t, _, _ in grids), modality
        fraction = self.fraction_of(BudgetShare(sum(sizes), *item))
        return split_evenly(keep_count(sum(sizes), fraction), sizes)

    def most(self, cells: int) -> int:
        """Upper bound of the keep count of a part of `cells` cells that shares a budget."""
        return min(cells, math.ceil(cells * self.fraction + 0.5))

    def tokens(self, span: VisualSpan) -> int:
        """Visual tokens of `span` that the tower keeps, special ones included."""
        t, h, w = span.grid
        parts, grid = (t, (1, h, w)) if self.frames_apart else (1, span.grid)
        return parts * self.cells([grid], span.modality)[0] + len(span.special)


def _unfit_for_layer(reducer: AnyReducer, layer: int) -> str:
    """Why a reducer cannot act before a decoder layer, or ""."""
    if only_plans(reducer):
        return (
            "only plans stages of other reducers. Name these in the plan (`patch(...).plan` has "
            "them), or give it to patch(reducer=...)"
        )
    if reducer.traits.decides:
        return (
            "compares pixels, which are seen before block 0 of the vision tower only. Use "
            "TowerStage(0, 1.0, reducer), or patch(reducer=...)"
        )
    if layer > 0 and reducer.traits.entry_only:
        return "reads the input of the first layer. Move the stage to layer 0"
    return ""


def _unfit_for_tower(reducer: AnyReducer) -> str:
    """Why a reducer cannot choose cells of the vision tower, or ""."""
    if only_plans(reducer):
        return "only plans stages of other reducers"
    if any(signal.source != "seen" for signal in reducer.needs):
        return "reads the question or attention, which do not exist before the tower has run"
    if reducer.traits.merges:
        return "merges tokens, and a mean of several places of a picture is no picture"
    if reducer.traits.entry_only:
        return "acts on the input of the decoder only"
    return ""


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
        if budgets != sorted(budgets, reverse=True):
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
        """Whether the kept fraction of an item depends on its size, or on its prompt's."""
        return any(s.budget is not None for s in self.stages)

    @cached_property
    def has_item_budget(self) -> bool:
        """Whether a stage has a budget for every item."""
        return any(s.budget is not None and not s.budget.whole_prompt for s in self.stages)

    @cached_property
    def may_merge(self) -> bool:
        """Whether a stage may merge dropped tokens into kept ones."""
        return any(bool(s.merge) for s in self.stages)

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
        self, num_layers: int, modality: str | None = None, share: BudgetShare | None = None
    ) -> list[float]:
        """Fraction of the tokens of a modality that each of `num_layers` decoder layers sees.

        None: modalities to which the stages give no fraction. `share`: sizes of the item, for plans
        with a budget.
        """
        current = self.tower.fraction_of(share) if self.tower else 1.0
        seen, stages = [], {s.layer: s.fraction_of(modality, share) for s in self.stages}
        for layer in range(num_layers):
            current = stages.get(layer, current)
            seen.append(current)
        return seen

    def ratio(
        self, num_layers: int, modality: str | None = None, share: BudgetShare | None = None
    ) -> float:
        """1 - mean over layers of the fraction seen: the ratio before rounding to tokens."""
        return 1.0 - sum(self.fractions(num_layers, modality, share)) / num_layers

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

    def counts(
        self, span: VisualSpan, num_layers: int, share: BudgetShare | None = None
    ) -> list[int]:
        """Visual tokens of `span` after each stage, non-increasing.

        Special tokens are always kept, so a late stage may be unable to keep as few as its fraction
        says. Earlier stages then keep fewer, as far as possible, so that the ratio of the plan is
        met (ours). `share`: sizes of the item, for plans with a budget.
        """
        fractions = [s.fraction_of(span.modality, share) for s in self.stages]
        if share is not None:
            pairs = zip(self.stages, fractions, strict=True)
            fractions = [s.budget.of_part(f, share) if s.budget else f for s, f in pairs]
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
        """Visual tokens of `span` that enter the decoder: all, or as many as the tower keeps.

        An upper bound if the pixels decide (`TowerStage.decides`).
        """
        return self.tower.tokens(span) if self.tower and span.modality != "audio" else span.visual

    def merging(
        self, span: VisualSpan, counts: list[int], share: BudgetShare | None, entering: int
    ) -> Stage | None:
        """The first stage that merges tokens of a span that keeps `counts`; or None.

        `entering` are the tokens that reach the decoder.
        """
        for stage, count in zip(self.stages, counts, strict=True):
            fraction = stage.fraction_of(span.modality, share)
            if count < entering and stage.merges(span.modality, fraction):
                return stage
            entering = count
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

    `reducers` are one for all stages, or one per layer; `current` is the fraction of the tokens
    before the first layer.
    """
    each = reducers if isinstance(reducers, list) else [reducers] * len(profile)
    stages = []
    for layer, (fraction, reducer) in enumerate(zip(profile, each, strict=True)):
        if fraction < current - 1e-12:
            stages.append(Stage(layer, max(fraction, 0.0), reducer))
            current = fraction
    return Plan(tuple(stages))
