"""Upper bound of selection: the tokens of true relevance, which need the answer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass

from torch import Tensor

from tokencomp.errors import ScoreError
from tokencomp.reducers._batch import top_k
from tokencomp.reducers.base import Reducer
from tokencomp.tokens.reduction import Reduction
from tokencomp.tokens.spans import VisualTokens

_TRUTH: ContextVar[Iterator[Tensor] | None] = ContextVar("tokencomp_oracle", default=None)


@contextlib.contextmanager
def truth(relevance: list[list[Tensor]]) -> Iterator[None]:
    """Hand the relevance of the next prefill to `oracle`.

    Per sample, per span: float (span.length,), as `tokencomp.training.relevance.relevance` returns
    it.
    """
    token = _TRUTH.set(iter([span for row in relevance for span in row]))
    try:
        yield
    finally:
        _TRUTH.reset(token)


@dataclass(frozen=True)
class Oracle(Reducer):
    """Keep the tokens that the right answer depends on most (labels of arXiv 2506.01097).

    It must know the answer before the prompt is read, so it is not a method to use but the upper
    bound for `selector`, and has no name in the registry: `patch(model, reducer=Oracle())`. Call
    the model inside `with truth(relevance): ...`.
    """

    name = "oracle"
    summary = "upper bound of selector, for evaluation: needs the answer (2506.01097)"

    def reduce(self, tokens: VisualTokens, keep: int) -> Reduction:
        spans = _TRUTH.get() or iter(())
        # Spans that are kept whole do not reach this function, so their relevance is skipped.
        scores = next((s for s in spans if s.shape[0] == len(tokens)), None)
        if scores is None:
            raise ScoreError(
                "oracle has no relevance for this span. Compute it with "
                "tokencomp.training.relevance.relevance(model, inputs, labels) and call the model "
                "inside `with tokencomp.evaluation.oracle.truth(relevance): ...`."
            )
        return Reduction(top_k(scores.to(tokens.features.device), tokens.special, keep))
