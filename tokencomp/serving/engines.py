"""What each engine can do with a method: one table, for checks and for the documentation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from tokencomp.errors import OptionError
from tokencomp.method import Method
from tokencomp.plan.options import OPTIONS


@dataclass(frozen=True)
class Feature:
    """A part of a method that some engines cannot run."""

    words: str  # its name in the documentation
    asked: Callable[[Method], str]  # how a method asks for it, for the message; "" if it does not
    fix: str  # what to do instead


def _weights(method: Method) -> str:
    on = method.options_in_force
    return "".join([f"{n}={on[n]!r}" for n, known in OPTIONS.items() if known.weighs and on[n]][:1])


def _tower(method: Method) -> str:
    if method.tower_ratio:
        return f"tower_ratio={method.tower_ratio!r}"
    repeats = method.repeats
    return "" if repeats is None else f"reducer={repeats.name!r}"


FEATURES = {
    "weights": Feature("merging", _weights, "Leave it out."),
    "tower": Feature("a stage in the vision tower", _tower, "Leave it out."),
    "by_modality": Feature(
        "ratios by modality",
        lambda method: f"ratio={method.ratios}" if method.ratios else "",
        "Give one ratio.",
    ),
    "audio": Feature(
        "ratios of audio",
        lambda method: f"ratio={method.ratios}" if "audio" in method.ratios else "",
        "Leave audio out.",
    ),
    "whole_prompt": Feature(
        "budgets of a whole prompt",
        lambda method: str(b) if (b := method.built_budget) and b.whole_prompt else "",
        "Give a number, which is for each image or video.",
    ),
    "speedup": Feature(
        "speedups",
        lambda method: f"speedup={method.speedup:g}" if method.speedup is not None else "",
        "Give a ratio and, where the engine has it, a tower ratio.",
    ),
    "plans": Feature(
        "plans", lambda method: "plan=..." if method.plan else "", "Name a reducer and a ratio."
    ),
}


@dataclass(frozen=True)
class Capability:
    """What an engine can do; `name` is for messages."""

    name: str
    refused: dict[str, str]  # by feature (`FEATURES`): why the engine cannot run it
    every_reducer: bool = False  # else only reducers whose choice depends on the item alone

    def fit(self, method: Method) -> Method:
        """The method as the engine runs it: merge="auto" drops where rows cannot have weights.

        Raises `OptionError` or `PlanError` if it asks for what the engine cannot run.
        """
        if "weights" in self.refused:
            off = {n: OPTIONS[n].off for n, v in method.options_in_force.items()
                   if OPTIONS[n].weighs and v == "auto"}  # fmt: skip
            method = replace(method, **off)
        for name, why in self.refused.items():
            if asked := FEATURES[name].asked(method):
                elsewhere = self.name != "MLX" and name not in ENGINES["hf"].refused
                other = " Or serve with `--engine hf`." if elsewhere else ""
                raise OptionError(f"{asked}: {why}. {FEATURES[name].fix}{other}")
        if not self.every_reducer and method.names_reducer:
            from tokencomp.serving.servable import check_servable

            check_servable(method.repeats.later if method.repeats else method.built_reducer)
            if method.tower_stage is not None:
                check_servable(method.built_tower_reducer)
                method.stages(num_layers=1, first_layer_stage=1)  # raises if they do not fit
        return method


BY_ITEM = "servers treat every image and clip by itself, so that caches stay valid"
ONE_REDUCER = "a setting of a server names one reducer"
NO_WEIGHTS = "rows that represent several tokens need weights in attention, which {} does not have"
NO_FLOPS = "this engine does not know the FLOPs of the model, which set what is kept"
ENGINES = {
    "hf": Capability("hf", {"whole_prompt": BY_ITEM, "plans": ONE_REDUCER}, every_reducer=True),
    "vllm": Capability(
        "vLLM",
        {
            "weights": NO_WEIGHTS.format("vLLM without --merge"),
            "audio": "the vLLM plugin compresses images and videos",
            "speedup": NO_FLOPS,
            "whole_prompt": BY_ITEM, "plans": ONE_REDUCER,
        },
    ),
    "sglang": Capability(
        "SGLang",
        {
            "weights": NO_WEIGHTS.format("SGLang"),
            "tower": "the SGLang plugin has no stage in the vision tower",
            "by_modality": "the SGLang plugin has one ratio for all media",
            "audio": "the SGLang plugin compresses images and videos",
            "speedup": NO_FLOPS,
            "whole_prompt": BY_ITEM, "plans": ONE_REDUCER,
        },
    ),
    "mlx": Capability(
        "MLX",
        {
            "tower": "tokencomp.mlx has no stage in the vision tower",
            "by_modality": "tokencomp.mlx has one ratio for all media",
            "audio": "tokencomp.mlx compresses images and videos",
            "speedup": NO_FLOPS,
            "whole_prompt": "tokencomp.mlx has budgets of single images and videos",
            "plans": "tokencomp.mlx has one stage, before the first layer",
        },
    ),
}  # fmt: skip


def engine(name: str, merging: bool = False) -> Capability:
    """The capability of an engine; `merging`: vLLM was started with `--merge`."""
    known = ENGINES[name]
    if not (merging and name == "vllm"):
        return known
    return replace(known, refused={n: why for n, why in known.refused.items() if n != "weights"})


def table() -> list[list[Any]]:
    """Rows of the table in `docs/serving.md`: feature, and yes or no for every engine."""
    rows = [["", *(known.name for known in ENGINES.values())]]
    for name, feature in FEATURES.items():
        able = ["no" if name in known.refused else "yes" for known in ENGINES.values()]
        rows.append([feature.words, *able])
    able = ["all" if known.every_reducer else "by item" for known in ENGINES.values()]
    return [*rows, ["reducers", *able]]
