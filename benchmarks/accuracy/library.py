"""Everything that the accuracy benchmark takes from tokencomp.

The scripts import these names from here, so that a rename in the library is one line in this file.
"""

from __future__ import annotations

from typing import Any

from benchmarks.publishing import environment, provenance
from tokencomp import available_reducers, extend_visual_context, make_reducer
from tokencomp.adapters.base import adapter_for
from tokencomp.cli import one_message
from tokencomp.errors import OptionError, TokenCompError, UnknownNameError
from tokencomp.evaluation.baselines import EqualTokens
from tokencomp.evaluation.metrics import McNemar, Retention, mcnemar, retention
from tokencomp.evaluation.runner import Run as EvalRun
from tokencomp.evaluation.runner import sweep
from tokencomp.evaluation.settings import (
    DOWNSCALE,
    FEWER_FRAMES,
    FULL,
    INPUT_BASELINES,
    Setting,
)
from tokencomp.inputs.loading import load_model
from tokencomp.inputs.questions import Example, shapesqa
from tokencomp.pages.plots import Point, lines
from tokencomp.patching import DEFAULT_REDUCER
from tokencomp.shapesqa.items import SIZE, items
from tokencomp.shapesqa.questions import FAMILIES, IMAGE_FAMILIES
from tokencomp.tokens import TOWER_SIGNALS
from tokencomp.trained.cards import locate, model_facts, replace_file, write_json
from tokencomp.training.data import ShapesQuestions
from tokencomp.training.measure import Measurement, Way
from tokencomp.zoo import available_models, load, metrics

__all__ = [
    "DEFAULT_REDUCER",
    "DOWNSCALE",
    "FAMILIES",
    "FEWER_FRAMES",
    "FULL",
    "IMAGE_FAMILIES",
    "INPUT_BASELINES",
    "SIZE",
    "TOWER_SIGNALS",
    "EqualTokens",
    "EvalRun",
    "Example",
    "McNemar",
    "Measurement",
    "OptionError",
    "Point",
    "Retention",
    "Setting",
    "ShapesQuestions",
    "TokenCompError",
    "UnknownNameError",
    "Way",
    "adapter_for",
    "available_models",
    "available_reducers",
    "environment",
    "extend_visual_context",
    "items",
    "lines",
    "load",
    "load_model",
    "locate",
    "make_reducer",
    "mcnemar",
    "metrics",
    "model_facts",
    "one_message",
    "predictions",
    "provenance",
    "replace_file",
    "retention",
    "shapesqa",
    "sweep",
    "write_json",
]


def predictions(record: dict[str, Any]) -> dict[str, str]:
    """The answer texts of a record of `Measurement`, by method: its dict besides `correct`."""
    return next(v for k, v in record.items() if isinstance(v, dict) and k != "correct")
