"""Accuracy of compressed models: runs on disk, equal-token baselines, paired statistics.

>>> from tokencomp.evaluation import evaluate, sweep, grid           # doctest: +SKIP
>>> run = evaluate(model, processor, examples, "aim", 0.75, "out/")  # doctest: +SKIP
"""

from tokencomp.evaluation.metrics import mcnemar, retention
from tokencomp.evaluation.runner import evaluate, sweep
from tokencomp.evaluation.runs import EvalRun
from tokencomp.evaluation.settings import Setting, grid
from tokencomp.inputs.questions import Example

__all__ = ["EvalRun", "Example", "Setting", "evaluate", "grid", "mcnemar", "retention", "sweep"]
