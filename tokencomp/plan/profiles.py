"""Plans at the same ratio whose tokens leave at other layers."""

from __future__ import annotations

from tokencomp.errors import PlanError
from tokencomp.plan.plan import LEAST, Plan, stages_at_changes
from tokencomp.plan.reducer import StageReducer
from tokencomp.plan.stages import TowerStage


def not_before(plan: Plan, first: int, num_layers: int) -> Plan:
    """The plan without a layer stage before `first`, at the same ratio (ours).

    Layers before `first` see the entry fraction, and later layers see less to make up for it.
    If those would lose more than half of what they see, tokens leave at entry instead.
    """
    if not any(0 < s.layer < first for s in plan.stages):
        return plan
    reducers = _reducers(plan, plan.stages[0].reducer, num_layers)
    return stages_at_changes(_delayed(plan.fractions(num_layers), first), reducers)


def behind(plan: Plan, tower: TowerStage, num_layers: int) -> Plan:
    """The plan at the same ratio behind a tower stage (ours).

    No layer sees more than what leaves the tower; layers that saw less before then see more, by
    one factor for all of them. If that is not enough, layers that saw nothing see some as well.

    Raises
    ------
    PlanError
        The plan would need more tokens than the tower leaves.
    """
    profile, most = plan.fractions(num_layers), tower.fraction
    total = sum(profile)
    if total > most * sum(f > 0 for f in profile) + 1e-9:
        profile = [max(f, LEAST) for f in profile]
    if total > most * num_layers + 1e-9:
        raise PlanError(
            f"the tower leaves {most:g} of the visual tokens, but the decoder is to see "
            f"{total / num_layers:g} of them on average over its layers. Lower tower_ratio, or "
            "raise ratio."
        )
    # The sum over all layers grows with the factor. At every ratio most / f one more layer
    # reaches what the tower leaves; between two of these ratios the sum is linear.
    capped, rest, factor = 0, sorted((f for f in profile if f > 0), reverse=True), 1.0
    for capped in range(len(rest) + 1):
        below = sum(rest[capped:])
        factor = (total - most * capped) / below if below > 0 else 1.0
        if capped == len(rest) or factor * rest[capped] <= most + 1e-12:
            break
    scaled = [min(most, factor * f) for f in profile]
    changes = stages_at_changes(scaled, _reducers(plan, tower.reducer, num_layers), most)
    return Plan(changes.stages, tower)


def _reducers(plan: Plan, first: StageReducer, num_layers: int) -> list[StageReducer]:
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
        scale = (total - first * head) / later
        if scale >= 0.5:
            return [head] * first + [scale * f for f in tail]
        scale = total / (first * tail[0] + later)
        if scale * tail[0] <= 1.0:
            return [scale * tail[0]] * first + [scale * f for f in tail]
    return [total / len(profile)] * len(profile)
