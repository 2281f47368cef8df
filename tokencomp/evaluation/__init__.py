"""Accuracy of compressed models: runs on disk, equal-token baselines, paired statistics.

>>> from tokencomp.evaluation import evaluate, sweep, grid           # doctest: +SKIP
>>> run = evaluate(model, processor, examples, "aim", 0.75, "out/")  # doctest: +SKIP
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_LAZY = {
    "Example": "tokencomp.inputs.questions",
    "shapesqa": "tokencomp.zoo.shapesqa.examples",
    "EvalRun": "tokencomp.evaluation.runs",
    "evaluate": "tokencomp.evaluation.runner",
    "sweep": "tokencomp.evaluation.runner",
    "Setting": "tokencomp.evaluation.settings",
    "grid": "tokencomp.evaluation.settings",
    "mcnemar": "tokencomp.evaluation.metrics",
    "retention": "tokencomp.evaluation.metrics",
}

__all__ = [
    "EvalRun",
    "Example",
    "Setting",
    "evaluate",
    "grid",
    "mcnemar",
    "retention",
    "shapesqa",
    "sweep",
]

if TYPE_CHECKING:
    from tokencomp.evaluation.metrics import mcnemar, retention
    from tokencomp.evaluation.runner import evaluate, sweep
    from tokencomp.evaluation.runs import EvalRun
    from tokencomp.evaluation.settings import Setting, grid
    from tokencomp.inputs.questions import Example
    from tokencomp.zoo.shapesqa.examples import shapesqa


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'tokencomp.evaluation' has no attribute {name!r}")
