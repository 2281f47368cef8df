"""Plans as JSON data, for files, the command line and stored runs."""

from __future__ import annotations

import json
from os import PathLike
from pathlib import Path
from typing import Any

from tokencomp.errors import PlanError
from tokencomp.plan.counts import Budget
from tokencomp.plan.options import OPTIONS, split, type_of
from tokencomp.plan.plan import Plan
from tokencomp.plan.stages import Stage, TowerStage
from tokencomp.reducers.registry import make_reducer, options_of
from tokencomp.validation import describe_type, fits

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
            **(
                {"by_modality": dict(s.by_modality)}
                if isinstance(s, Stage) and s.by_modality
                else {}
            ),
            **(s.stage_options if isinstance(s, Stage) else {}),
        }
        for s in stages
    ]


def _size(stage: Stage | TowerStage) -> dict[str, Any]:
    """The fraction or the budget of a stage."""
    budget = stage.budget
    if budget is None:
        return {"fraction": float(stage.fraction)}
    if not budget.whole_prompt and getattr(stage, "share", None) is None:
        return {"budget": budget.tokens}
    raise PlanError(
        f"a stage with {budget} depends on all items of a prompt, or on a schedule solved for each "
        "of them. Write down the reducer and its ratio or budget instead of the plan."
    )


def plan_from_json(data: list[dict[str, Any]]) -> Plan:
    """The plan that `plan_to_json` wrote; `options` may be missing.

    Raises
    ------
    PlanError
        Not a list; a stage without layer, fraction or reducer, with other keys, or with a value of
        the wrong type; whatever `Stage`, `TowerStage` and `Plan` refuse.
    UnknownNameError, OptionError
        A reducer that is not registered, or options that it refuses.
    """
    if not isinstance(data, list):
        raise PlanError(f"plan {data!r}: expected a list of stages.")
    stages, tower = [], None
    for i, item in enumerate(data):
        if not _is_stage(item, "layer") and not (i == 0 and _is_stage(item, "tower")):
            raise PlanError(
                f"stage {i} of the plan is {item!r}; expected an object with layer (an integer), "
                "fraction (a number), reducer (a name) and, if needed, options (an object), "
                f"by_modality (fractions of modalities that differ) and {_options_in_words()}, "
                'e.g. {"layer": 0, "fraction": 0.5, "reducer": "bipartite"}. A stage may '
                "have budget (visual tokens kept of every item) instead of fraction. The first may "
                "have tower (a block of the vision tower) instead of layer."
            )
        reducer = make_reducer(item["reducer"], **item.get("options", {}))
        budget = Budget.of(item["budget"]) if "budget" in item else None
        fraction = float(item.get("fraction", 1.0))
        if "tower" in item:
            tower = TowerStage(item["tower"], fraction, reducer, budget=budget)
        else:
            fractions = tuple(item.get("by_modality", {}).items())
            options, _ = split(item)
            stages.append(Stage(item["layer"], fraction, reducer, fractions, budget, **options))
    return Plan(tuple(stages), tower)


def _options_in_words() -> str:
    """The stage options with their types, e.g. "merge (true or false or 'auto')"."""
    return ", ".join(f"{name} ({describe_type(type_of(name))})" for name in OPTIONS)


def _is_stage(item: Any, place: str) -> bool:
    """Whether `item` describes a stage at a "layer", or one at a block of the "tower"."""
    if not isinstance(item, dict):
        return False
    budget = "budget" in item  # `Budget` checks its value
    size = {"budget": object} if budget else {"fraction": float}
    hints: dict[str, Any] = {place: int, **size, "reducer": str}
    further = {"options"} if place == "tower" else {"options", *OPTIONS}
    further |= {"by_modality"} if place == "layer" and not budget else set()
    options = item.get("options", {})
    return (
        set(item) - further == set(hints)
        and all(fits(item[key], hint) for key, hint in hints.items())
        and isinstance(item.get("by_modality", {}), dict)
        and isinstance(options, dict)
        and all(isinstance(key, str) for key in options)
    )


def as_plan(plan: PlanLike) -> Plan:
    """A plan from a `Plan`, from JSON data, or from the path of a JSON file.

    Raises
    ------
    PlanError
        A file that cannot be read or is not JSON; otherwise as `plan_from_json`.
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
