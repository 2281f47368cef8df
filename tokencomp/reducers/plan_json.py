"""Plans as JSON data, for files, the command line and stored runs."""

from __future__ import annotations

import json
from os import PathLike
from pathlib import Path
from typing import Any

from tokencomp.errors import PlanError
from tokencomp.plan.counts import Budget
from tokencomp.plan.options import OPTIONS, split
from tokencomp.plan.plan import Plan, Stage, TowerStage
from tokencomp.plan.speed import Goal
from tokencomp.reducers.registry import make_reducer, options_of

PlanLike = Plan | list[dict[str, Any]] | str | PathLike[str]


def plan_to_json(plan: Plan) -> list[dict[str, Any]]:
    """A plan as JSON data: one object per stage, with layer, fraction, reducer and options.

    A stage in the vision tower comes first; it has "tower", the number of its first block, instead
    of "layer".

    Raises
    ------
    PlanError
        A reducer without a registered name cannot be read again.
    """
    stages: list[Stage | TowerStage] = [*plan.stages]
    if plan.tower is not None:
        stages.insert(0, plan.tower)
    nameless = [type(s.reducer).__name__ for s in stages if not s.reducer.name]
    if nameless:
        raise PlanError(
            f"{nameless[0]} has no registered name, so the plan cannot be read again. Register it "
            'with @tokencomp.register_reducer("name").'
        )
    return [
        {
            **({"tower": s.block} if isinstance(s, TowerStage) else {"layer": int(s.layer)}),
            **_size(s),
            "reducer": s.reducer.name,
            "options": options_of(s.reducer),
            **(_stage_only(s) if isinstance(s, Stage) else {}),
        }
        for s in stages
    ]


def _stage_only(stage: Stage) -> dict[str, Any]:
    fractions = {"by_modality": dict(stage.by_modality)} if stage.by_modality else {}
    return fractions | stage.stage_options


def _size(stage: Stage | TowerStage) -> dict[str, Any]:
    """The fraction or the budget of a stage."""
    budget = stage.budget
    if budget is None:
        return {"fraction": float(stage.fraction)}
    solved = isinstance(budget, Goal)
    if not budget.whole_prompt and not solved and getattr(stage, "from_mean", None) is None:
        return {"budget": budget.tokens}
    raise PlanError(
        f"a stage with {budget} depends on all items of a prompt, or on a schedule solved for each "
        "of them. Write down the reducer and its ratio, budget or speedup instead of the plan."
    )


def plan_from_json(data: list[dict[str, Any]]) -> Plan:
    """The plan that `plan_to_json` wrote; `options` may be missing.

    Raises
    ------
    PlanError
        Not a list; a stage without layer, fraction or reducer, or with other keys; whatever
        `Stage`, `TowerStage` and `Plan` refuse.
    UnknownNameError, OptionError
        A reducer that is not registered, or options that it refuses.
    """
    if not isinstance(data, list):
        raise PlanError(f"plan {data!r}: expected a list of stages.")
    stages, tower = [], None
    for i, item in enumerate(data):
        if not _is_stage(item, first=i == 0):
            raise PlanError(
                f"stage {i} of the plan is {item!r}; expected an object with layer (the first may "
                "have tower instead), fraction or budget, reducer (a name) and, if needed, "
                f"{', '.join(('options', 'by_modality', *OPTIONS))}, "
                'e.g. {"layer": 0, "fraction": 0.5, "reducer": "bipartite"}.'
            )
        reducer = make_reducer(item["reducer"], **item.get("options", {}))
        budget = Budget.of(item["budget"]) if "budget" in item else None
        fraction = item.get("fraction", 1.0)
        if "tower" in item:
            tower = TowerStage(item["tower"], fraction, reducer, budget=budget)
        else:
            fractions = tuple(item.get("by_modality", {}).items())
            options, _ = split(item)
            stages.append(Stage(item["layer"], fraction, reducer, fractions, budget, **options))
    return Plan(tuple(stages), tower)


def _is_stage(item: Any, first: bool) -> bool:
    """Whether `item` has the keys of a stage; `Stage`, `TowerStage` and `Budget` check values."""
    if not isinstance(item, dict) or not isinstance(item.get("reducer"), str):
        return False
    place = "tower" if first and "tower" in item else "layer"
    size = "budget" if "budget" in item else "fraction"
    further = {"options"} if place == "tower" else {"options", *OPTIONS}
    further |= {"by_modality"} if (place, size) == ("layer", "fraction") else set()
    mappings = (item.get(name, {}) for name in ("options", "by_modality"))
    return set(item) - further == {place, size, "reducer"} and all(
        isinstance(mapping, dict) for mapping in mappings
    )


def as_plan(plan: PlanLike) -> Plan:
    """A plan from a `Plan`, from JSON data, or from the path of a JSON file.

    `PlanError` for a file that cannot be read or is not JSON; otherwise as `plan_from_json`.
    """
    if isinstance(plan, Plan):
        return plan
    if not isinstance(plan, str | PathLike):
        return plan_from_json(plan)
    try:
        data = json.loads(Path(plan).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        fix = "Give a JSON file of stages (see tokencomp.plan_to_json), or the stages themselves."
        raise PlanError(f"plan file {str(plan)!r}: {error}. {fix}") from error
    return plan_from_json(data)
