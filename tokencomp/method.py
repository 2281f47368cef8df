"""Methods: a reducer with its options at a ratio or budget, or a plan; and their changes.

Python calls, the command line, evaluation, training and servers pass this one type around.
`Method.override` is the only way in which a setting meets a default.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from tokencomp.errors import OptionError, PlanError, RatioError, UnknownOptionError
from tokencomp.plan.counts import Budget, check_ratio, ratio_text
from tokencomp.plan.options import (
    OPTIONS,
    StageOptions,
    check_exclusive,
    check_option,
    one_amount,
    split,
)
from tokencomp.plan.plan import MEDIA, Plan, TowerStage
from tokencomp.plan.schedules import after_tower, by_item, by_modality, not_before
from tokencomp.plan.speed import check_speedup
from tokencomp.validation import check_effect

if TYPE_CHECKING:  # tokencomp.mlx runs without torch, which reducers import
    from tokencomp.reducers._repeats import DropsRepeats
    from tokencomp.reducers.base import Reducer

DEFAULT_REDUCER = "auto"  # ignores the question, so media caches of servers serve every question
DEFAULT_TOWER_REDUCER = "kcenter"
# tower_ratio="auto" keeps this many times the cells that the decoder will see, so that the reducer
# of the decoder, which may read the question, has a choice.
TOWER_SLACK = 1.6
# With a ratio it removes at most this share: more costs over 3 % of the answers about images
# (benchmarks/frontier).
TOWER_MOST = 0.4
TOWER = ("tower_ratio", "tower_reducer")
FIELDS = ("budget", "speedup", *TOWER, *OPTIONS)  # that `options` may contain as well


def usual_ratio(reducer: str | Reducer) -> float:
    """The default ratio of `patch`: 0 if the pixels decide what is kept, else 0.5."""
    from tokencomp.reducers.registry import available_reducers

    known = available_reducers().get(reducer) if isinstance(reducer, str) else type(reducer)
    return 0.0 if known is not None and known.traits.decides else 0.5


@dataclass(frozen=True)
class Method(StageOptions):
    """A method at a ratio. Hashable, and equal to every method with equal fields.

    The fields are arguments of `tokencomp.patch`, which describes them and the errors, as far as
    they do not depend on the model. Refused as well: a tower reducer without a tower ratio, and
    tower_ratio="auto" at ratio 0.
    """

    reducer: str | Reducer = "auto"
    ratio: float = 0.0  # 0 is off; a mapping from modalities to ratios goes to `ratios`
    # Options of the named reducer. A `budget`, the tower's and those of stages among them, such as
    # `merge`, are moved to the fields of these names.
    options: dict[str, Any] = field(default_factory=dict)
    plan: Plan | None = None
    tower_ratio: float | Literal["auto"] = 0.0
    tower_reducer: str | Reducer = "auto"
    # Ratios by modality, in place of `ratio`; modalities that are not named stay whole.
    ratios: dict[str, float] = field(default_factory=dict)
    budget: int | Mapping[str, int] | None = None
    speedup: float | None = None  # in place of both: `tokencomp.plan.speed`
    # Names of fields and options whose values come from an earlier method (`override`). They may
    # have no effect at this ratio; others without effect are refused.
    inherited: frozenset[str] = field(default=frozenset(), compare=False, repr=False)

    def __post_init__(self) -> None:
        moved, options = split(self.options, FIELDS)
        self._assign(**moved, options=options)
        if isinstance(self.ratio, Mapping):
            if not self.ratio:
                raise RatioError(f"ratio={{}}: names no modality. Use {', '.join(MEDIA)}.")
            self._assign(ratios=self.ratio, ratio=0.0)
        self._assign(ratios=_checked_ratios(self.ratios), ratio=check_ratio(self.ratio))
        if self.tower_ratio != "auto":
            other = ', or "auto"'
            self._assign(tower_ratio=check_ratio(self.tower_ratio, "tower_ratio", other))
        if self.speedup is not None:
            self._assign(speedup=check_speedup(self.speedup))
        check_exclusive(self._given)
        if self.plan is None:
            self.check_options(self.built_reducer if self.names_reducer else None)
            self._check_tower()

    def _assign(self, **values: Any) -> None:
        """Set fields to their normal form during construction."""
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @property
    def _given(self) -> dict[str, Any]:
        """The arguments that differ from their defaults, for `check_exclusive`."""
        ratio = 0.0 if self.plan is not None else self.ratio  # a plan's is only written down
        values = {
            "reducer": self.reducer, "ratio": ratio, "ratios": self.ratios, "budget": self.budget,
            "speedup": self.speedup, "plan": self.plan, "options": self.options,
            "tower_ratio": self.tower_ratio, "tower_reducer": self.tower_reducer,
            **self.stage_options,
        }  # fmt: skip
        usual = {"reducer": "auto", "tower_reducer": "auto"}
        return {name: v for name, v in values.items() if v and v != usual.get(name)}

    def _check_tower(self) -> None:
        """Refuse what the tower stage cannot do with any model."""
        dropped, budget = self.dropped_cells, self.built_budget
        given = self.tower_ratio or self.tower_reducer != "auto"
        if given and self.built_tower_reducer.traits.decides:
            name = self.built_tower_reducer.name
            raise OptionError(
                f"tower_reducer={name!r}: the pixels decide how much {name!r} drops, so it goes "
                f"with no tower ratio. Use reducer={name!r}, with a ratio or budget if you like."
            )
        if given and self.repeats:
            raise OptionError(
                f"tower_ratio={self.tower_ratio!r} together with reducer={self.repeats.name!r}, "
                "which is the stage in the vision tower itself. Leave one out."
            )
        lapsed = "tower_ratio" in self.inherited and self.tower_ratio != "auto"
        if budget and given and not lapsed and (self.tower_ratio != "auto" or budget.whole_prompt):
            raise OptionError(
                f"tower_ratio={self.tower_ratio!r} together with {budget}: what the tower keeps of "
                "an item must follow from that item and the budget alone. Use "
                "tower_ratio='auto' with a budget for every item, such as budget=512, or a ratio."
            )
        on = self.tower_ratio or self.speedup is not None
        unused = {} if on else {"tower_reducer": "with tower_ratio=0"}
        if self.off:
            unused["tower_ratio"] = "at ratio=0"
        if self.repeats and not (self.ratio or self.ratios or budget):
            why = f"without a ratio or budget, by which {self.repeats.name!r} drops more"
            unused |= {name: why for name, v in self.stage_options.items() if v != "auto"}
            if "then" in self.options.keys() - self.inherited:
                check_effect(self.repeats.name, self.repeats, {"then": why})
        if dropped > self.ratio:
            usual = " (the default)" if self.ratio == usual_ratio(self.reducer) else ""
            raise PlanError(
                f"tower_ratio={dropped:g} leaves {1 - dropped:.3g} of the visual tokens, but "
                f"ratio={self.ratio:g}{usual} asks for {1 - self.ratio:.3g} in the decoder. Give a "
                f"ratio of {dropped:g} or more too, or tower_ratio={self.ratio:g} or less."
            )
        if self.tower_reducer != "auto" or self.tower_ratio:
            TowerStage(0, 1.0 - dropped, self.built_tower_reducer)
        check_effect(
            "method", self, {n: why for n, why in unused.items() if n not in self.inherited}
        )

    @property
    def dropped_cells(self) -> float:
        """The tower ratio as a number, "auto" resolved; 0 at ratio 0 and with a budget.

        An inherited one is at most the ratio.
        """
        if self.off:
            return 0.0
        if self.tower_ratio == "auto":
            return min(TOWER_MOST, max(0.0, 1.0 - TOWER_SLACK * (1.0 - self.ratio)))
        return min(self.tower_ratio, self.ratio if "tower_ratio" in self.inherited else 1.0)

    @property
    def tower_stage(self) -> TowerStage | None:
        """The stage in the vision tower; None without one."""
        dropped, budget = self.dropped_cells, None
        if self.tower_ratio == "auto" and self.built_budget is not None:
            budget = Budget(int(TOWER_SLACK * self.built_budget.tokens + 0.5))
        if not dropped and budget is None:
            return None
        return TowerStage(0, 1.0 - dropped, self.built_tower_reducer, budget=budget)

    @property
    def repeats(self) -> DropsRepeats | None:
        """The reducer, if the pixels decide what it keeps in the vision tower."""
        if self.plan is not None or not self.names_reducer:
            return None
        reducer: Any = self.built_reducer
        return reducer if reducer.traits.decides else None

    @cached_property
    def built_tower_reducer(self) -> Reducer:
        """The reducer of the tower stage, "auto" resolved."""
        from tokencomp.reducers.registry import make_reducer

        name = DEFAULT_TOWER_REDUCER if self.tower_reducer == "auto" else self.tower_reducer
        return make_reducer(name)

    @property
    def options_in_force(self) -> dict[str, Any]:
        return self.usual_options | self.given_options

    @property
    def usual_options(self) -> dict[str, Any]:
        """Meaning of None for every option of the stages, which depends on the reducer."""
        reducer = self.reducer if self.plan is None else None
        return {name: known.meaning(reducer) for name, known in OPTIONS.items()}

    @property
    def names_reducer(self) -> bool:
        """Whether `reducer` names or is a reducer; subclasses allow further names."""
        return True

    @cached_property
    def built_reducer(self) -> Reducer:
        """The reducer object with its options."""
        return _made(self.reducer, self.options)

    @property
    def off(self) -> bool:
        """Whether the ratio is 0 for all media, and no pixels decide what is kept."""
        if self.repeats is not None:
            return False
        if self.plan is not None:
            return not self.plan.active
        if self.budget is not None or self.speedup is not None:
            return False
        return not any((self.ratio, *self.ratios.values()))

    @property
    def active(self) -> bool:
        return not self.off

    @property
    def shown_ratio(self) -> str:
        """The ratio in words, as the command line takes it: "0.75", or "video=0.75,audio=0.5".

        Of a budget: "budget=512", or "budget=prompt=4096".
        """
        return ratio_text(self.written_ratio)

    @property
    def asked(self) -> str:
        """The amount in words: "ratio 0.75", "budget=512" or "speedup=2"."""
        if self.speedup is not None:
            return f"speedup={self.speedup:g}"
        return f"ratio {self.shown_ratio}" if self.built_budget is None else str(self.built_budget)

    @property
    def written_ratio(self) -> float | dict[str, float] | str:
        """The ratio in stored runs: numbers, or a budget in words."""
        if self.plan is not None and self.plan.has_budget:
            return "budgets"
        if self.speedup is not None:
            return self.asked
        return (self.ratios or self.ratio) if self.built_budget is None else str(self.built_budget)

    @property
    def requested(self) -> dict[str, Any]:
        """The amount as an argument: `{"ratio": 0.75}`, `{"budget": 512}` or `{"speedup": 2}`."""
        if self.speedup is not None:
            return {"speedup": self.speedup}
        if self.budget is not None:
            return {"budget": self.budget}
        return {"ratio": self.ratios or self.ratio}

    @property
    def plain(self) -> dict[str, Any]:
        """The arguments of a method that names a reducer, for JSON; "auto" is resolved."""
        tower = {name: getattr(self, name) for name in TOWER} if self.tower_ratio else {}
        usual = {"reducer": self.built_reducer.name, "options": self.options, **self.requested}
        return {**usual, **self.options_in_force, **tower}

    @cached_property
    def built_budget(self) -> Budget | None:
        """The checked budget; None: there is a ratio."""
        return None if self.budget is None else Budget.of(self.budget)

    @cached_property
    def _plans(self) -> dict[tuple[int, int], Plan]:
        return {}

    def stages(self, num_layers: int, first_layer_stage: int) -> Plan:
        """The plan for a decoder: the explicit one, or the reducer's schedule at `ratio`.

        Before `first_layer_stage` the model allows no stage between layers.
        """
        if self.plan is not None:
            return self.plan
        if self.speedup is not None:
            raise OptionError(
                f"speedup={self.speedup:g} needs the model, whose FLOPs set what is kept. Give a "
                "ratio and a tower ratio, or use tokencomp.patch."
            )
        key = num_layers, first_layer_stage
        if key not in self._plans:
            plan = self._solved(num_layers, first_layer_stage)
            on = self.stage_options
            self._plans[key] = plan.with_options(**on) if on else plan
        return self._plans[key]

    def _solved(self, num_layers: int, first: int) -> Plan:
        """The schedule of the reducer for a ratio, for ratios by modality, or for a budget."""
        reducer, tower = self.built_reducer, self.tower_stage
        if self.repeats is not None:
            reducer, tower = self.repeats.later, TowerStage(0, 1.0, reducer)
        if self.ratios:
            plan = by_modality(self.ratios, reducer, num_layers, first)
            return dataclasses.replace(plan, tower=tower)
        if self.built_budget is not None:
            return by_item(self.built_budget, reducer, num_layers, first, tower)
        plan = not_before(reducer.plan(self.ratio, num_layers), first, num_layers)
        return plan if tower is None else after_tower(plan, tower, num_layers)

    def override(self, changes: Mapping[str, Any]) -> Method:
        """This method with changes: of `Handle.set`, a request, low detail, or a ratio by load.

        Changes are by field, also among `options` as in a new method; None changes nothing. A
        ratio, budget and plan replace one another. A plan replaces the reducer and the tower stage
        as well, and a ratio or option for the stages of a plan is refused. Another reducer starts
        from its default options. What is not named keeps its value, but has no effect where it does
        not fit: an option of the stages that the new reducer does not allow, or that is usual for
        the default reducer; and a tower ratio above a new ratio or next to a budget, until there is
        a ratio that it fits again.
        """
        moved, options = split(changes.get("options") or {}, FIELDS)
        given = {n: v for n, v in {**changes, **moved}.items() if v is not None}
        given.pop("options", None)
        amounts = ("ratio", "budget", "plan", "speedup")
        ratio, budget, plan, speedup = (given.pop(name, None) for name in amounts)
        asked = one_amount(ratio, budget, plan, speedup)
        planned = plan is None and self.plan is not None and "reducer" not in given
        if planned and (asked or options or given):
            raise OptionError(
                "the current stages come from plan=..., so there is no reducer that could plan for "
                "another ratio or option. Give set(reducer=...) too, or a new plan."
            )
        inherited = frozenset({*TOWER, *OPTIONS, "then"} - given.keys() - options.keys())
        if plan is not None:
            blank = {**dict.fromkeys(OPTIONS), "tower_ratio": 0.0, "tower_reducer": "auto"}
            values: dict[str, Any] = {
                **blank,
                "reducer": "auto",
                "ratios": {},
                "budget": None,
                "speedup": None,
            }
            values |= given
            return self._with({**values, "plan": plan, "options": options}, inherited)
        values = {"plan": None, **given}
        if asked:
            values |= {"ratio": 0.0, "ratios": {}, "budget": None, "speedup": None, **asked}
            if speedup is not None:  # it sets the tower ratio as well
                values.setdefault("tower_ratio", 0.0)
        other = given.get("reducer", self.reducer) != self.reducer
        values["options"] = options if other else {**self.options, **options}
        if other:
            values |= self._lapsed(given["reducer"], options, inherited)
        return self._with(values, inherited)

    def _with(self, values: dict[str, Any], inherited: frozenset[str]) -> Method:
        return dataclasses.replace(self, **values, inherited=inherited)

    def _lapsed(
        self, reducer: str | Reducer, options: dict[str, Any], inherited: frozenset[str]
    ) -> dict[str, Any]:
        """Inherited options of the stages that are not for another reducer, as None."""
        known = _made(reducer, options)
        lapsed: dict[str, Any] = {}
        for name in OPTIONS.keys() & inherited:
            value, usual = getattr(self, name), OPTIONS[name].meaning("auto")
            try:
                fits = value is None or (value == OPTIONS[name].off or value != usual)
                if fits and value is not None:
                    check_option(name, value, known)
            except OptionError:
                fits = False
            if not fits:
                lapsed[name] = None
        return lapsed

    def describe(self) -> dict[str, Any]:
        """Plain form with every option of the reducer; the same for all inactive methods."""
        if not self.active:
            return {"ratio": 0.0}
        from tokencomp.reducers.registry import options_of

        options = options_of(self.built_reducer)
        plain = {"reducer": self.built_reducer.name, **self.requested, "options": options}
        if tower := self.tower_stage:
            size = {"budget": b.tokens} if (b := tower.budget) else {"ratio": self.dropped_cells}
            chosen = {"reducer": tower.reducer.name, "options": options_of(tower.reducer)}
            plain["tower"] = {**size, **chosen}
        return {**plain, **self.stage_options}

    def __hash__(self) -> int:
        options = json.dumps(self.options, sort_keys=True, default=str)
        amount = self.ratio, tuple(self.ratios.items()), self.built_budget, self.tower_ratio
        return hash((self.reducer, options, self.plan, amount, self.speedup))


def _made(reducer: str | Reducer, options: dict[str, Any]) -> Reducer:
    """The reducer with its options; an unknown one may be a misspelt argument of the method."""
    from tokencomp.reducers.registry import ARGUMENTS, make_reducer

    try:
        return make_reducer(reducer, **options)
    except UnknownOptionError as error:
        names = ["reducer", "ratio", *FIELDS]
        others = ", ".join(name for name in ARGUMENTS if name not in names)
        raise UnknownOptionError(
            f"{error} Options of every method: {', '.join(names)}; of patch alone: {others}."
        ) from None


def _checked_ratios(ratios: Mapping[str, Any]) -> dict[str, float]:
    """Ratios by modality in a fixed order, so that equal settings are equal."""
    for modality in ratios:
        if modality not in MEDIA:
            raise RatioError(
                f"ratio={dict(ratios)!r}: {modality!r} is no modality. Use {', '.join(MEDIA)}."
            )
    return {k: check_ratio(ratios[k], f"ratio of {k}") for k in MEDIA if k in ratios}
