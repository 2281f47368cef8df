"""Settings of an evaluation: a method and its ratio."""

from __future__ import annotations

import hashlib
import itertools
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

from tokencomp.adapters.registry import adapter_for
from tokencomp.errors import OptionError
from tokencomp.method import TOWER, Method, usual_ratio
from tokencomp.plan.options import OPTIONS, in_words
from tokencomp.plan.plan import Plan
from tokencomp.reducers.base import Reducer
from tokencomp.reducers.plan_json import plan_from_json, plan_to_json
from tokencomp.reducers.published import deviation, revision

FULL = "full"
PLAN = "plan"
RANDOM = "random"
UNIFORM = "uniform"
MERGE = "merge"
DOWNSCALE = "downscale"
FEWER_FRAMES = "fewer_frames"
NATIVE = "native"
INPUT_BASELINES = {
    DOWNSCALE: "smaller images and frames, so that the processor makes as few tokens (baseline)",
    FEWER_FRAMES: "fewer video frames (smaller images) for as few tokens (baseline)",
    NATIVE: "the model's own budget of tokens per image, where its processor has one (baseline)",
}

FIRST = (FULL, RANDOM, UNIFORM, *INPUT_BASELINES)
"""Methods that come first in tables."""


@dataclass(frozen=True)
class Setting(Method):
    """A method with a row name, which may also be the full model or an input baseline.

    `reducer` is one of `Method`, or "full" (no compression), "plan" (explicit stages, in JSON form
    the option `plan`), or one of `INPUT_BASELINES`. Every method at ratio 0 is the full model.
    """

    reducer: str | Reducer = FULL
    name: str = ""  # of its row; by default the reducer's, or "plan"
    variant: str = ""  # which of several models answers, see `sweep`

    def __post_init__(self) -> None:
        asked = self.ratio or self.options or self.budget is not None or self.speedup is not None
        if self.reducer == FULL and self.plan is None and asked:
            raise OptionError(
                f"the uncompressed model ('{FULL}') takes no ratio and no options; got "
                f"ratio={self.ratio}, budget={self.budget}, options={self.options}."
            )
        if self.reducer == PLAN and self.plan is None:
            options = dict(self.options)
            self._assign(plan=plan_from_json(options.pop("plan", None)), options=options)
        if self.plan is not None and self.reducer in (PLAN, FULL):
            self._assign(reducer="auto")
        super().__post_init__()
        if self.input_baseline and self.written_options:
            raise OptionError(f"{self.reducer!r} has no options; got {self.written_options}.")
        sized = self.built_budget is not None or self.speedup is not None or self.ratios
        if self.input_baseline and sized:
            raise OptionError(
                f"{self.reducer!r} makes all media smaller by one ratio; got {self.shown_ratio}. "
                "Give it a number, or leave it out."
            )
        if not self.name:
            own = getattr(self.reducer, "name", "") or type(self.reducer).__name__
            name = self.reducer if isinstance(self.reducer, str) else own
            self._assign(name=FULL if self.off else PLAN if self.plan is not None else name)
        if self.off:
            self._assign(ratios={}, reducer=FULL, options={}, plan=None)
            self._assign(tower_ratio=0.0, tower_reducer="auto", **dict.fromkeys(OPTIONS))

    @property
    def names_reducer(self) -> bool:
        return self.reducer != FULL and not self.input_baseline

    @property
    def input_baseline(self) -> bool:
        """Whether the media are shrunk before the processor and the model is not patched."""
        return self.reducer in INPUT_BASELINES

    @property
    def active(self) -> bool:
        """Whether the model itself is patched."""
        return not self.off and self.names_reducer

    @property
    def written_options(self) -> dict[str, Any]:
        """All options in JSON form, including a plan and options of stages."""
        plan = {} if self.plan is None else {"plan": plan_to_json(self.plan)}
        usual = self.usual_options
        stage = {n: value for n, value in self.options_in_force.items() if value != usual[n]}
        tower: dict[str, Any] = {}
        towered = self.speedup is not None or self.tower_stage is not None
        if self.active and self.plan is None and towered:
            reducer = getattr(self.tower_reducer, "name", self.tower_reducer)
            tower = {} if self.speedup is not None else {"tower_ratio": self.tower_ratio}
            tower |= {} if reducer == "auto" else {"tower_reducer": reducer}
        return {**plan, **self.options, **stage, **tower}

    @property
    def method(self) -> str:
        """Reducer with all options, on which stored answers depend: defaults may change."""
        if not self.active or self.plan is not None:
            return ""
        reducer = self.built_reducer
        number = revision(reducer)
        again = f", revision {number}" if number > 1 else ""
        again += "".join(f", code {digest}" for digest in code_of(reducer))
        subsets = ", a subset per question" if self.reducer == RANDOM else ""
        tower = f", behind {self.built_tower_reducer!r}" if self.tower_stage else ""
        stage = "".join(f", {word}" for word in in_words(self.stage_options))
        return f"{reducer!r}{again}{subsets}{stage}{tower}"

    def deviation(self, layers: int, frames: int = 0) -> str:
        """How the method departs from its paper at this depth, in words; see `Published`."""
        other = self.plan is not None or self.ratios or self.speedup is not None
        if not self.active or other or self.built_budget is not None:
            return ""
        return deviation(self.built_reducer, self.ratio, layers, frames)

    @property
    def identity(self) -> dict[str, Any]:
        """What the answers of this setting depend on, ready for JSON."""
        return {
            "reducer": self.name,
            "ratio": self.written_ratio,
            "options": self.written_options,
            "method": self.method,
        }

    @property
    def key(self) -> str:
        """Name of the row in tables of many settings, e.g. "aim@0.75"."""
        return f"{self.name}@{self.shown_ratio}"

    @property
    def label(self) -> str:
        """Name of the run folder, e.g. "aim-0.75" or "prune-0.9-schedule=fastv"."""
        if self.off:
            return self.name
        return label_of(self.name, self.shown_ratio, self.written_options)

    __hash__ = Method.__hash__


def code_of(reducer: Reducer) -> list[str]:
    """Hashes of the code of reducers that others wrote: the same options may change meaning."""
    kinds = {type(one) for one in (reducer, *vars(reducer).values()) if isinstance(one, Reducer)}
    by_module = {kind.__module__: kind for kind in kinds}
    others = [n for n in sorted(by_module) if n.partition(".")[0] != "tokencomp"]
    return [hashlib.sha256(_code(by_module[n])).hexdigest()[:8] for n in others]


def _code(kind: type) -> bytes:
    """The module of a class; of a notebook, which is no file, the functions of the class."""
    file = getattr(sys.modules[kind.__module__], "__file__", None)
    if file:
        return Path(file).read_bytes()
    functions = [f for f in vars(kind).values() if isinstance(f, FunctionType)]
    return repr([_instructions(f.__code__) for f in functions]).encode()


def _instructions(code: CodeType) -> tuple[Any, ...]:
    """Bytecode, names and constants; file and lines change whenever a cell runs again."""
    constants = []
    for one in code.co_consts:
        if isinstance(one, CodeType):  # a lambda or a comprehension
            one = _instructions(one)
        elif isinstance(one, frozenset):  # its order changes from process to process
            one = sorted(map(repr, one))
        constants.append(one)
    return code.co_code, code.co_names, constants


def label_of(name: str, shown_ratio: str, options: Mapping[str, Any]) -> str:
    """The label of a setting; stored settings may have options that this release lacks."""
    extra = [f"{k}={v}" for k, v in sorted(options.items()) if k != PLAN]
    return "-".join([name, shown_ratio, *extra]).replace("/", "_")


def grid(
    reducers: Iterable[str],
    ratios: Iterable[Any],
    /,
    budgets: Iterable[Any] = (),
    speedups: Iterable[float] = (),
    **options: Any,
) -> list[Setting]:
    """The full model, then every reducer at every ratio above 0 (or by modality), and every amount.

    Reducers whose count the pixels decide also run at ratio 0, if it is among the ratios.
    """
    asked: list[dict[str, Any]] = [{"budget": budget} for budget in budgets]
    asked += [{"speedup": speedup} for speedup in speedups]
    asked += [{"ratio": ratio} for ratio in ratios]
    media = {name: value for name, value in options.items() if name not in (*TOWER, *OPTIONS)}
    found = [Setting()]
    for name, amount in itertools.product(dict.fromkeys(reducers), asked):
        ratio = amount.get("ratio")
        above = any(ratio.values()) if isinstance(ratio, Mapping) else ratio
        if above or "ratio" not in amount or usual_ratio(name) == 0:
            own = media if name in INPUT_BASELINES else options
            found.append(Setting(name, options=own, **amount))
    return found


def seeded(settings: Sequence[Setting], seeds: int) -> list[Setting]:
    """Add `random` with seeds 1 to `seeds` - 1 to the settings that contain it."""
    random = [s for s in settings if s.name == RANDOM and not s.written_options]
    more = [replace(s, options={"seed": seed}) for seed in range(1, seeds) for s in random]
    return list(dict.fromkeys([*settings, *more]))


def planned(plan: Plan, model: Any, **options: Any) -> list[Setting]:
    """The full model, then `plan` with its ratio in the decoder of `model`."""
    adapter = adapter_for(model)
    layers = len(adapter.layers)
    plan.check(layers, adapter.first_layer_stage)
    return [Setting(), Setting("auto", plan.ratio(layers), options, plan)]
