"""Accuracy of compressed models: runs on disk, equal-token baselines, paired statistics.

>>> from tokencomp.evaluation import evaluate, sweep, grid           # doctest: +SKIP
>>> run = evaluate(model, processor, examples, "aim", 0.75, "out/")  # doctest: +SKIP
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_LAZY = {
    "Example": "examples",
    "shapesqa": "examples",
    "Run": "runner",
    "evaluate": "runner",
    "sweep": "runner",
    "Setting": "settings",
    "grid": "settings",
    "mcnemar": "metrics",
    "retention": "metrics",
}

__all__ = [
    "Example",
    "Run",
    "Setting",
    "evaluate",
    "grid",
    "mcnemar",
    "retention",
    "shapesqa",
    "sweep",
]

if TYPE_CHECKING:
    from tokencomp.evaluation.examples import Example, shapesqa
    from tokencomp.evaluation.metrics import mcnemar, retention
    from tokencomp.evaluation.runner import Run, evaluate, sweep
    from tokencomp.evaluation.settings import Setting, grid


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        module = importlib.import_module(f"tokencomp.evaluation.{_LAZY[name]}")
        return getattr(module, name)
    raise AttributeError(f"module 'tokencomp.evaluation' has no attribute {name!r}")
