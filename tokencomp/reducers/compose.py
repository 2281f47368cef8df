"""Two reducers in one plan: one at decoder entry, one between layers."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokencomp.errors import OptionError, PlanError
from tokencomp.plan import Plan, Stage, check_ratio
from tokencomp.reducers._options import check_range, fits
from tokencomp.reducers.base import Reducer, make_reducer

if TYPE_CHECKING:
    from torch import nn

PROBE = (0.5, 32)
PlanLike = Plan | list[dict[str, Any]] | str | PathLike[str]


@dataclass(frozen=True)
class Compose(Reducer):
    """An entry reducer, then a layer reducer on what it leaves; together they meet the ratio.

    `make_reducer("merge+prune", share=0.7, **{"prune.score": "last_query"})`

    Attributes
    ----------
    entry, layer
        The two reducers.
    share
        How much of the reduction happens at entry, in [0, 1]: the entry stage leaves
        (1 - ratio)^share of the tokens, and the layer reducer's own schedule, solved for the
        rest, acts on those. Ours.
    """

    entry: Reducer
    layer: Reducer
    share: float = 0.5
    name: str = field(init=False, compare=False)  # type: ignore[misc]

    summary = "an entry reducer and a layer reducer, budget-matched together (ours)"

    def __post_init__(self) -> None:
        for part in (self.entry, self.layer):
            if not isinstance(part, Reducer):
                raise OptionError(f"compose: {part!r} is no reducer; build it with make_reducer.")
        object.__setattr__(self, "name", f"{self.entry.name}+{self.layer.name}")
        super().__post_init__()
        object.__setattr__(self, "merges", self.entry.merges or self.layer.merges)
        object.__setattr__(self, "revision", max(self.entry.revision, self.layer.revision))
        check_range(self.name, "share", self.share, 0, 1)
        if not _acts(self.entry, at_entry=True):
            raise OptionError(
                f"{self.name}: {self.entry.name!r} does not act at decoder entry, so it cannot "
                "come first. First goes an entry reducer such as merge, condiv or pool."
            )
        if not _acts(self.layer, at_entry=False):
            raise OptionError(
                f"{self.name}: {self.layer.name!r} does not act between layers only, so it cannot "
                "come second. Second goes a layer reducer such as prune, fastv or adsc."
            )

    def plan(self, ratio: float, num_layers: int) -> Plan:
        left = 1.0 - check_ratio(ratio)
        if left == 1.0:
            return Plan()
        first = left**self.share
        later = self.layer.plan(max(1.0 - left / first, 0.0), num_layers).stages
        # a layer schedule too steep for its layers starts at entry: that part joins the entry stage
        start = later[0].fraction if later and later[0].layer == 0 else 1.0
        entry = (Stage(0, first * start, self.entry),) if first * start < 1 else ()
        scaled = [Stage(s.layer, first * s.fraction, s.reducer) for s in later if s.layer > 0]
        return Plan((*entry, *scaled))

    def for_model(self, model: nn.Module) -> Reducer:
        return dataclasses.replace(
            self, entry=self.entry.for_model(model), layer=self.layer.for_model(model)
        )

    def options(self) -> dict[str, Any]:
        """Options as `make_reducer(self.name, **options)` takes them."""
        parts = {
            f"{part.name}.{key}": value
            for part in (self.entry, self.layer)
            for key, value in part.options().items()
        }
        return {"share": self.share, **parts}


def _acts(reducer: Reducer, at_entry: bool) -> bool:
    layers = [s.layer for s in reducer.plan(*PROBE).stages]
    return layers == [0] if at_entry else 0 not in layers


def compose(name: str, options: dict[str, Any]) -> Compose:
    """Build "first+second" with options named "part.option", or "option" where only one has it.

    Raises
    ------
    UnknownNameError, OptionError
        A part that is not registered or is at the wrong place; an option that no part has, or
        that both have.
    """
    names = [part.strip() for part in name.split("+")]
    if len(names) != 2 or names[0] == names[1] or not all(names):
        raise OptionError(
            f"reducer {name!r}: a composition has two different parts, an entry reducer and a "
            'layer reducer, e.g. "merge+prune".'
        )
    fields = {
        part: {f.name for f in dataclasses.fields(make_reducer(part))} - {"name"} for part in names
    }
    given: dict[str, dict[str, Any]] = {part: {} for part in names}
    for key, value in options.items():
        prefix, _, option = key.rpartition(".")
        owners = [prefix] if prefix in given else [p for p in names if option in fields[p]]
        if key == "share":
            continue
        if prefix and prefix not in given:
            raise OptionError(f"reducer {name!r} has no part {prefix!r} (option {key!r}).")
        if len(owners) != 1:
            known = sorted(f"{p}.{o}" for p in names for o in fields[p])
            why = "is an option of both parts" if owners else "is an option of neither part"
            raise OptionError(
                f"reducer {name!r}: {key!r} {why}. It has: share, {', '.join(known)}."
            )
        given[owners[0]][option] = value
    entry, layer = (make_reducer(part, **given[part]) for part in names)
    return Compose(entry, layer, options.get("share", 0.5))


def plan_to_json(plan: Plan) -> list[dict[str, Any]]:
    """A plan as plain data: one object per stage with layer, fraction, reducer and options.

    Raises
    ------
    PlanError
        A reducer has no name, by which the plan could be read again.
    """
    nameless = [type(s.reducer).__name__ for s in plan.stages if not s.reducer.name]
    if nameless:
        raise PlanError(
            f"{nameless[0]} has no name to write down. Register it with "
            '@tokencomp.register_reducer("name").'
        )
    return [
        {
            "layer": int(s.layer),
            "fraction": float(s.fraction),
            "reducer": s.reducer.name,
            "options": s.reducer.options(),
        }
        for s in plan.stages
    ]


def plan_from_json(data: list[dict[str, Any]]) -> Plan:
    """The plan written as by `plan_to_json`; `options` may be left out.

    Raises
    ------
    PlanError
        No list; a stage without layer, fraction or reducer, with further keys, or with a value of
        another type; what `Stage` and `Plan` refuse.
    UnknownNameError, OptionError
        A reducer that is not registered, or options that it refuses.
    """
    if not isinstance(data, list):
        raise PlanError(f"plan {data!r}: expected a list of stages.")
    stages = []
    for i, item in enumerate(data):
        if not _is_stage(item):
            raise PlanError(
                f"stage {i} of the plan is {item!r}; expected an object with layer (an integer), "
                "fraction (a number), reducer (a name) and, if needed, options (an object), e.g. "
                '{"layer": 0, "fraction": 0.5, "reducer": "merge"}.'
            )
        reducer = make_reducer(item["reducer"], **item.get("options", {}))
        stages.append(Stage(item["layer"], float(item["fraction"]), reducer))
    return Plan(tuple(stages))


def _is_stage(item: Any) -> bool:
    hints = {"layer": int, "fraction": float, "reducer": str}
    if not isinstance(item, dict) or set(item) - {"options"} != set(hints):
        return False
    options = item.get("options", {})
    typed = all(fits(item[key], hint) for key, hint in hints.items())
    return typed and isinstance(options, dict) and all(isinstance(key, str) for key in options)


def as_plan(given: PlanLike) -> Plan:
    """The plan itself, the one written as JSON, or the one in a JSON file.

    Raises
    ------
    PlanError
        A file that cannot be read or holds no JSON; else as `plan_from_json`.
    """
    if isinstance(given, Plan):
        return given
    if not isinstance(given, str | PathLike):
        return plan_from_json(given)
    try:
        data = json.loads(Path(given).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        fix = "Give a JSON file of stages (see tokencomp.plan_to_json), or the stages themselves."
        raise PlanError(f"plan file {str(given)!r}: {error}. {fix}") from error
    return plan_from_json(data)
