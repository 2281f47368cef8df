"""One row of a comparison: which method at which ratio."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from tokencomp.errors import OptionError
from tokencomp.plan import Plan, check_ratio

FULL = "full"
PLAN = "plan"
RANDOM = "random"
PROPORTIONAL = "proportional_attention"
DOWNSCALE = "downscale"
FEWER_FRAMES = "fewer_frames"
INPUT_BASELINES = {
    DOWNSCALE: "smaller images and frames, so that the processor makes as few tokens (baseline)",
    FEWER_FRAMES: "fewer video frames (smaller images) for as few tokens (baseline)",
}


@dataclass(frozen=True)
class Setting:
    """A method at a ratio.

    Attributes
    ----------
    reducer
        A registered reducer, two of them ("merge+prune"), "full" (no compression), "plan" (stages
        made by hand, see `planned`), or an input baseline: "downscale", "fewer_frames".
    ratio
        In [0, 1); every method at 0 is the full model.
    options
        Options of the reducer; of "plan", `plan` in its JSON form. Both take
        `proportional_attention` (see `tokencomp.patch`).
    """

    reducer: str = FULL
    ratio: float = 0.0
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "ratio", check_ratio(self.ratio))
        if self.reducer == FULL and (self.ratio or self.options):
            raise OptionError(
                f"the uncompressed model ('{FULL}') takes no ratio and no options; got "
                f"ratio={self.ratio}, options={self.options}."
            )
        if self.input_baseline and self.options:
            raise OptionError(f"{self.reducer!r} has no options; got {self.options}.")
        if self.reducer not in (FULL, "auto", *INPUT_BASELINES):
            self._check_options()
        if self.ratio == 0:
            object.__setattr__(self, "reducer", FULL)
            object.__setattr__(self, "options", {})

    def _check_options(self) -> None:
        """Raise what `tokencomp.patch` would, before a model is loaded."""
        from tokencomp.engine.proportional import check_merges
        from tokencomp.plan_json import plan_from_json
        from tokencomp.reducers.registry import make_reducer

        options = dict(self.options)
        proportional = options.pop(PROPORTIONAL, False)
        if self.reducer == PLAN:
            plan, made = plan_from_json(options.pop("plan", None)), None
            if options:
                raise OptionError(f"a plan has its options in its stages; got {options} beside it.")
        else:
            plan, made = Plan(), make_reducer(self.reducer, **options)
        if proportional:
            check_merges(plan, made)

    @property
    def request(self) -> dict[str, Any]:
        """What `tokencomp.patch` is asked for."""
        named = {} if self.reducer == PLAN else {"ratio": self.ratio, "reducer": self.reducer}
        return {**named, **self.options}

    @property
    def method(self) -> str:
        """The reducer with all its options, defaults included; "" where no reducer acts.

        Answers depend on it: another release may have other defaults.
        """
        from tokencomp.patching import DEFAULT_REDUCER
        from tokencomp.reducers.registry import make_reducer

        if not self.compresses or self.reducer == PLAN:
            return ""
        options = {k: v for k, v in self.options.items() if k != PROPORTIONAL}
        name = DEFAULT_REDUCER if self.reducer == "auto" else self.reducer
        made = make_reducer(name, **options)
        told = f"{made!r}, revision {made.revision}" if made.revision > 1 else repr(made)
        return f"{told}, a subset per question" if name == RANDOM else told

    @property
    def input_baseline(self) -> bool:
        """The processor is given less, the model is left alone."""
        return self.reducer in INPUT_BASELINES

    @property
    def compresses(self) -> bool:
        """The model itself is patched."""
        return self.ratio > 0 and not self.input_baseline

    @property
    def label(self) -> str:
        """Folder and row name, e.g. "aim-0.75" or "prune-0.9-schedule=fastv"."""
        if self.ratio == 0:
            return FULL
        extra = [f"{k}={v}" for k, v in sorted(self.options.items()) if k != "plan"]
        return "-".join([self.reducer, f"{self.ratio:g}", *extra]).replace("/", "_")

    def key(self) -> str:
        return json.dumps([self.reducer, self.ratio, self.options], sort_keys=True, default=str)

    def __hash__(self) -> int:
        return hash(self.key())


def grid(reducers: Iterable[str], ratios: Iterable[float], /, **options: Any) -> list[Setting]:
    """The full model, then every reducer at every ratio above 0."""
    above = [r for r in ratios if r > 0]
    return [Setting(), *(Setting(name, r, options) for name in reducers for r in above)]


def planned(plan: Plan, model: Any, **options: Any) -> list[Setting]:
    """The full model, then `plan` at the ratio that it has in the decoder of `model`.

    Raises
    ------
    PlanError
        A stage that this decoder does not have.
    """
    from tokencomp.adapters.base import adapter_for
    from tokencomp.plan_json import plan_to_json

    adapter = adapter_for(model)
    layers = len(adapter.layers)
    plan.check(layers, adapter.first_layer_stage)
    return [Setting(), Setting(PLAN, plan.ratio(layers), {"plan": plan_to_json(plan), **options})]
