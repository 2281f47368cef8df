"""The upper bound of selection in a sweep: the relevance of the full model's own answers."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

from tokencomp.evaluation.batches import Answers
from tokencomp.evaluation.oracle import Oracle, truth
from tokencomp.evaluation.settings import Setting
from tokencomp.patching import unpatched
from tokencomp.training.data import answered
from tokencomp.training.relevance import TARGET, Target, relevance


class OracleTruth:
    """Gives `Oracle` the relevance of the full model's own answers, batch by batch."""

    def __init__(self, model: Any, processor: Any) -> None:
        self.model, self.processor = model, processor
        self._batch: dict[str, Any] | None = None
        self._relevance: dict[str, Any] = {}

    def __call__(
        self, setting: Setting, inputs: dict[str, Any], answers: Answers
    ) -> AbstractContextManager[Any]:
        if not isinstance(setting.reducer, Oracle):
            return nullcontext()
        if inputs is not self._batch:
            self._batch, self._relevance = inputs, {}
        target = cast(Target, setting.target or TARGET)
        if target not in self._relevance:
            self._relevance[target] = self._explain(inputs, answers[Setting()], target)
        return truth(self._relevance[target])

    def _explain(self, inputs: dict[str, Any], answers: list[str], target: Target) -> Any:
        said = [answer or "?" for answer in answers]
        with unpatched(self.model):
            forced = answered(self.model, self.processor, inputs, said, end=False)
            return relevance(self.model, *forced, target)


def oracle(ratio: float, target: Target) -> Setting:
    """The oracle at a ratio, which keeps the tokens of the largest relevance for this target."""
    return Setting(Oracle(), ratio, name=oracle_name(target), target=target)


def oracle_name(target: Target) -> str:
    return f"oracle ({target})"
