"""Everything that the accuracy benchmark takes from tokencomp.

The scripts import these names from here, so that a rename in the library is one line in this file.
"""

from __future__ import annotations

from typing import Any

from benchmarks.publishing import environment, provenance
from tokencomp import available_reducers, extend_visual_context, make_reducer
from tokencomp.adapters.registry import adapter_for
from tokencomp.cli import one_message
from tokencomp.errors import OptionError, TokenCompError, UnknownNameError
from tokencomp.evaluation.baselines import EqualTokens
from tokencomp.evaluation.cost import PARTS
from tokencomp.evaluation.lost import LostItem, draw_lost
from tokencomp.evaluation.metrics import (
    Difference,
    McNemar,
    Retention,
    difference,
    mcnemar,
    retention,
)
from tokencomp.evaluation.native import has_budget
from tokencomp.evaluation.packed import PackedAnswers, pack, unpack
from tokencomp.evaluation.runner import sweep
from tokencomp.evaluation.runs import EvalRun
from tokencomp.evaluation.settings import (
    DOWNSCALE,
    FEWER_FRAMES,
    FULL,
    INPUT_BASELINES,
    NATIVE,
    Setting,
)
from tokencomp.inputs.loading import load_model
from tokencomp.inputs.questions import Example
from tokencomp.method import DEFAULT_REDUCER
from tokencomp.pages.plots import Point, lines
from tokencomp.pages.report import work_cell
from tokencomp.reducers.base import Reducer
from tokencomp.shapesqa.difficulty import DIFFICULTIES, is_image_family
from tokencomp.shapesqa.examples import blind_guess, shapesqa
from tokencomp.shapesqa.items import SIZE, items
from tokencomp.shapesqa.questions import FAMILIES
from tokencomp.signals import TOWER_SIGNALS
from tokencomp.storage import replace_file, write_json
from tokencomp.trained.cards import locate, model_facts, weights_hash
from tokencomp.training.data import ShapesQuestions
from tokencomp.training.measure import Measurement
from tokencomp.training.relevance import TARGET, Target
from tokencomp.zoo import available_models, load, metrics

__all__ = [
    "DEFAULT_REDUCER",
    "DIFFICULTIES",
    "DOWNSCALE",
    "FAMILIES",
    "FEWER_FRAMES",
    "FULL",
    "INPUT_BASELINES",
    "NATIVE",
    "PARTS",
    "SIZE",
    "TOWER_SIGNALS",
    "Difference",
    "EqualTokens",
    "EvalRun",
    "Example",
    "LostItem",
    "McNemar",
    "Measurement",
    "OptionError",
    "PackedAnswers",
    "Point",
    "Retention",
    "Setting",
    "ShapesQuestions",
    "TokenCompError",
    "UnknownNameError",
    "adapter_for",
    "available_models",
    "available_reducers",
    "blind_guess",
    "difference",
    "draw_lost",
    "environment",
    "extend_visual_context",
    "has_budget",
    "is_image_family",
    "items",
    "lines",
    "load",
    "load_model",
    "locate",
    "make_reducer",
    "mcnemar",
    "metrics",
    "model_facts",
    "named",
    "one_message",
    "pack",
    "provenance",
    "replace_file",
    "retention",
    "shapesqa",
    "sweep",
    "unpack",
    "weights_hash",
    "work_cell",
    "write_json",
]


def named(
    name: str,
    ratio: float = 0.0,
    reducer: str | Reducer | None = None,
    options: dict[str, Any] | None = None,
    variant: str = "",
    target: Target = TARGET,
) -> Setting:
    """A setting by the name of its row; without a reducer, the one that the row is named after."""
    method = (reducer or name) if ratio else FULL
    chosen = options if ratio and options else {}
    return Setting(method, ratio, chosen, name=name, variant=variant, target=target)
