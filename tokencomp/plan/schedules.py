"""Layer schedules: the fraction of visual tokens that every layer sees, at a given mean.

Each schedule has a natural shape from its paper. For a target below the mean of that shape, the
same shape prunes earlier (ours); for a target above it, pruning starts later or drops less. The
mean over layers always equals the target. `not_before` and `after_tower` fit a plan to a model, or
to a tower stage, at the same ratio; `by_item` and `by_modality` give every item, or modality, the
schedule of its ratio.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Protocol

from tokencomp.errors import OptionError, PlanError
from tokencomp.plan.counts import Budget
from tokencomp.plan.options import AnyReducer
from tokencomp.plan.plan import LEAST, Plan, Stage, TowerStage, from_profile

Schedule = Callable[..., list[float]]
PROBES = tuple(i / 50 for i in range(1, 50))
"""Ratios at which a method is asked before which layers it cuts."""
MOST_SOLVED = 1024


def early(natural: list[float], target: float) -> list[float]:
    """Lower a natural profile to mean `target` with one more step at the very start.

    The step comes after layer 0 if the later layers still see at least half of `target`;
    otherwise it comes before layer 0.
    """
    total = target * len(natural)
    height = (total - 1) / max(sum(natural[1:]), 1e-9)
    if height >= target / 2:
        return [1.0, *(height * f for f in natural[1:])]
    height = total / max(sum(natural), 1e-9)
    return [height * f for f in natural]


def bisect(mean_at: Callable[[float], list[float]], target: float, lo: float, hi: float) -> float:
    """The parameter in [lo, hi] for which `mean_at`, which increases, has the value `target`."""
    for _ in range(80):
        mid = (lo + hi) / 2
        profile = mean_at(mid)
        if sum(profile) / len(profile) < target:
            lo = mid
        else:
            hi = mid
    return hi


def solved(
    family: Callable[[float], list[float]], target: float, lo: float, hi: float
) -> list[float]:
    """The profile of mean `target` in a family whose mean increases with a parameter.

    `family(lo)` is the published shape, which `early` lowers for smaller targets; `family(hi)`
    drops nothing.
    """
    natural = family(lo)
    if target <= sum(natural) / len(natural):
        return early(natural, target)
    return family(bisect(family, target, lo, hi))


def ramp(num_layers: int, start: float, width: float) -> list[float]:
    """AIM's ramp: layer l passes clamp(1 - (l - start + 1)/width, 0, 1) to layer l + 1.

    `start` may be fractional: the mean is continuous in it.
    """
    seen = [1.0]
    for layer in range(num_layers - 1):
        fraction = 1.0 - (layer - start + 1) / width
        seen.append(min(seen[-1], max(min(fraction, 1.0), 0.0)))
    return seen


def check_ramp(owner: str, start: float, stop: float) -> None:
    """Raise `OptionError` unless 0 ≤ start < stop ≤ 1."""
    if not 0 <= start < stop <= 1:
        raise OptionError(
            f"{owner}: start={start!r}, stop={stop!r}; allowed: fractions of the depth, "
            "0 ≤ start < stop ≤ 1."
        )


def natural_aim(num_layers: int, start: float = 0.5, stop: float = 22 / 28) -> list[float]:
    """AIM's video schedule, layers 14 … 22 of 28, scaled to the depth (arXiv 2412.03248)."""
    first, last = round(start * num_layers), round(stop * num_layers)
    return ramp(num_layers, first, max(last - first, 1))


def aim(num_layers: int, target: float, start: float = 0.5, stop: float = 22 / 28) -> list[float]:
    """AIM's ramp, shifted later for large targets and lowered from the start for small ones."""
    first, last = round(start * num_layers), round(stop * num_layers)
    width = max(last - first, 1)
    return solved(lambda s: ramp(num_layers, s, width), target, first, num_layers + width)


def pyramid(num_layers: int, target: float) -> list[float]:
    """PyramidDrop: × ½, or a larger factor if the target allows, at 1/4, 1/2 and 3/4 of the depth.

    See arXiv 2410.17247.
    """
    return solved(functools.partial(natural_pyramid, num_layers), target, 0.5, 1.0)


def once(num_layers: int, target: float, first: int, least: float) -> list[float]:
    """One cut before layer `first`, or earlier if it would keep less than `least`."""
    for free in range(first, 0, -1):
        left = (target * num_layers - free) / max(num_layers - free, 1)
        if left >= least:
            return [1.0] * free + [left] * (num_layers - free)
    return [target] * num_layers


def fastv(num_layers: int, target: float) -> list[float]:
    """FastV: one cut after layer 2 (arXiv 2403.06764); earlier if the target is too small."""
    return once(num_layers, target, 2, target / 2)


def natural_pyramid(num_layers: int, factor: float = 0.5) -> list[float]:
    """PyramidDrop's published shape: half of the tokens go at 1/4, 1/2 and 3/4 of the depth."""
    return [factor ** (4 * layer // num_layers) for layer in range(num_layers)]


def natural_fastv(num_layers: int) -> list[float]:
    """FastV's published shape: all tokens up to layer 2, half of them from there on."""
    return [1.0 if layer < 2 else 0.5 for layer in range(num_layers)]


def sparsevlm(num_layers: int, target: float) -> list[float]:
    """SparseVLM's cuts (arXiv 2410.04417), each to a larger fraction if the target allows."""
    natural = natural_sparsevlm(num_layers)
    return solved(lambda p: [f ** (1 - p) for f in natural], target, 0.0, 1.0)


def natural_sparsevlm(num_layers: int) -> list[float]:
    """SparseVLM's published shape: 300, 200 and 118 of 576 after layers 2, 6 and 15 of 32."""
    cuts = {16: 118 / 576, 7: 200 / 576, 3: 300 / 576}
    layers = [layer * 32 // num_layers for layer in range(num_layers)]
    return [next((f for first, f in cuts.items() if at >= first), 1.0) for at in layers]


NATURAL: dict[str, Schedule] = {
    "aim": natural_aim,
    "pyramid": natural_pyramid,
    "fastv": natural_fastv,
    "sparsevlm": natural_sparsevlm,
}
SCHEDULES: dict[str, Schedule] = {
    "aim": aim,
    "pyramid": pyramid,
    "fastv": fastv,
    "sparsevlm": sparsevlm,
}


# -- the same ratio at other layers --------------------------------------------------------------


def not_before(plan: Plan, first: int, num_layers: int) -> Plan:
    """The plan without stages between layer 0 and layer `first`, at the same ratio (ours).

    Layers before `first` see the entry fraction, and later layers see less to compensate. If those
    would lose more than half of what they see, tokens are dropped at entry instead.
    """
    if not any(0 < s.layer < first for s in plan.stages):
        return plan
    reducers = _reducers(plan, plan.stages[0].reducer, num_layers)
    return from_profile(_delayed(plan.fractions(num_layers), first), reducers)


def after_tower(plan: Plan, tower: TowerStage, num_layers: int) -> Plan:
    """The plan at the same ratio after a tower stage (ours).

    No layer sees more than the tower outputs; layers that saw less before then see more, by a
    common factor. If that is not enough, layers that saw nothing see some as well. `PlanError` if
    the plan needs more tokens than the tower outputs.
    """
    profile, most = plan.fractions(num_layers), tower.fraction
    total = sum(profile)
    if total > most * sum(f > 0 for f in profile) + 1e-9:
        profile = [max(f, LEAST) for f in profile]
    if total > most * num_layers + 1e-9:
        raise PlanError(
            f"the tower keeps {most:g} of the visual tokens, but the decoder is to see "
            f"{total / num_layers:g} of them on average over its layers. Lower tower_ratio, or "
            "raise ratio."
        )
    # Solve Σ min(most, factor · f) = total: `capped` layers are at `most`, the others below it,
    # where the sum is linear in the factor.
    capped, rest, factor = 0, sorted((f for f in profile if f > 0), reverse=True), 1.0
    for capped in range(len(rest) + 1):
        below = sum(rest[capped:])
        factor = (total - most * capped) / below if below > 0 else 1.0
        if capped == len(rest) or factor * rest[capped] <= most + 1e-12:
            break
    scaled = [min(most, factor * f) for f in profile]
    changes = from_profile(scaled, _reducers(plan, tower.reducer, num_layers), most)
    return Plan(changes.stages, tower)


def _reducers(plan: Plan, first: AnyReducer, num_layers: int) -> list[AnyReducer]:
    """The latest reducer before every layer; `first` before any stage."""
    by_layer, reducers = {s.layer: s.reducer for s in plan.stages}, [first]
    for layer in range(num_layers):
        reducers.append(by_layer.get(layer, reducers[-1]))
    return reducers[1:]


def _delayed(profile: list[float], first: int) -> list[float]:
    """A profile with the mean of `profile` and no change at layers 1 … first - 1."""
    head, tail, total = profile[0], profile[first:], sum(profile)
    later = sum(tail)
    if later > 0:
        # First choice: layers before `first` see the entry fraction, later ones less.
        scale = (total - first * head) / later
        if scale >= 0.5:
            return [head] * first + [scale * f for f in tail]
        # Second: they see as much as layer `first`, and all are scaled alike.
        scale = total / (first * tail[0] + later)
        if scale * tail[0] <= 1.0:
            return [scale * tail[0]] * first + [scale * f for f in tail]
    # Last: the same fraction in all layers.
    return [total / len(profile)] * len(profile)


# -- a schedule for every item or modality -------------------------------------------------------


class Planner(Protocol):
    """A reducer that plans, `tokencomp.Reducer`."""

    def plan(self, ratio: float, num_layers: int) -> Plan: ...


def by_item(
    budget: Budget, method: Planner, num_layers: int, first: int, tower: TowerStage | None = None
) -> Plan:
    """The plan that gives every item the schedule of its ratio.

    Hooks are installed before item sizes are known, so the plan has a stage before every layer
    before which the method cuts at some ratio. For items whose schedule does not cut there, the
    count does not change. `first` is the first layer before which the model allows a stage between
    layers. A `tower` stage has a budget of at least as many tokens.
    """

    def plan_of(left: float) -> Plan:
        """The plan under which all layers see the fraction `left` on average."""
        plan = not_before(method.plan(1.0 - left, num_layers), first, num_layers)
        if tower is None or tower.budget is None:
            return plan
        seen = min(1.0, left * tower.budget.tokens / budget.tokens)
        return after_tower(plan, replace(tower, fraction=seen, budget=None), num_layers)

    # All layers before which the method cuts at some ratio.
    reducers: dict[int, AnyReducer] = {}
    for ratio in PROBES:
        reducers |= {s.layer: s.reducer for s in plan_of(1.0 - ratio).stages}
    layers = sorted(reducers)
    if layers == [0]:
        return Plan((Stage(0, 1.0, reducers[0], budget=budget),), tower)
    # Schedules are solved when an item with this fraction comes, and cached.
    seen = functools.lru_cache(MOST_SOLVED)(lambda left: plan_of(left).fractions(num_layers))

    def from_mean(start: int, stop: int) -> Callable[[float], float]:
        """Maps the mean fraction over all layers to that over layers start … stop - 1."""
        return lambda left: sum(seen(left)[start:stop]) / (stop - start)

    ends = [*layers[1:], num_layers]
    return Plan(
        tuple(
            Stage(a, 1.0, reducers[a], budget=budget, from_mean=from_mean(a, b))
            for a, b in zip(layers, ends, strict=True)
        ),
        tower,
    )


def by_modality(ratios: Mapping[str, float], method: Planner, num_layers: int, first: int) -> Plan:
    """The stages of all modalities in one plan; modalities without a ratio are not reduced."""
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
