"""The upper bound of selection in a sweep: the relevance of the full model's own answers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tokencomp.errors import ScoreError
from tokencomp.evaluation.batches import Answers
from tokencomp.evaluation.settings import Setting
from tokencomp.patching import unpatched
from tokencomp.reducers.base import ScoreReducer
from tokencomp.tokens.tokens import Tokens
from tokencomp.training.data import answered
from tokencomp.training.relevance import TARGET, Target, explain

Relevance = list[list[Tensor]]  # per sample, per span: float (patches,)
_TRUTH: ContextVar[Relevance | None] = ContextVar("tokencomp_oracle", default=None)


@contextlib.contextmanager
def truth(relevance: Relevance) -> Iterator[None]:
    """Hand the relevance of the patches of the next prefill to `oracle`."""
    token = _TRUTH.set(relevance)
    try:
        yield
    finally:
        _TRUTH.reset(token)


@dataclass(frozen=True)
class Oracle(ScoreReducer):
    """Keep the tokens that the right answer depends on most (labels of arXiv 2506.01097).

    It must know the answer before the prompt is read, so it is not a method to use but the upper
    bound for `selector`, and has no name in the registry: `patch(model, reducer=Oracle())`. Call
    the model inside `with truth(relevance): ...`. `target` is what of the answer is explained.
    """

    target: Target = TARGET
    name = "oracle"
    summary = "upper bound of selector, for evaluation: needs the answer (2506.01097)"

    def scores(self, tokens: Tokens) -> Tensor:
        relevance, ((sample, span),) = _TRUTH.get(), tokens.span_ids
        if relevance is None:
            raise ScoreError(
                "oracle has no relevance for this span. Compute it with "
                "tokencomp.training.relevance.explain(model, inputs, labels) and call the model "
                "inside `with truth(relevance): ...`."
            )
        return relevance[sample][span].to(tokens.device)


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
        target = setting.reducer.target
        if target not in self._relevance:
            self._relevance[target] = self._explain(inputs, answers[Setting()], target)
        return truth(self._relevance[target])

    def _explain(self, inputs: dict[str, Any], answers: list[str], target: Target) -> Any:
        said = [answer or "?" for answer in answers]
        with unpatched(self.model):
            forced = answered(self.model, self.processor, inputs, said, end=False)
            seen, found = explain(self.model, *forced, target)
        pairs = zip(seen.spans, found, strict=True)
        return [
            [values[~span.special_mask(values.device)] for span, values in zip(*pair, strict=True)]
            for pair in pairs
        ]


def oracle(ratio: float, target: Target) -> Setting:
    """The oracle at a ratio, which keeps the tokens of the largest relevance for this target."""
    return Setting(Oracle(target), ratio, name=oracle_name(target))


def oracle_name(target: Target) -> str:
    return f"oracle ({target})"
