"""Upper bound for evaluation: selection by the true relevance of the answer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass

from torch import Tensor

from tokencomp.errors import ScoreError
from tokencomp.reducers.base import Reducer, register_reducer, top_k
from tokencomp.tokens import Reduction, VisualTokens

_TRUTH: ContextVar[Iterator[Tensor] | None] = ContextVar("tokencomp_oracle", default=None)


@contextlib.contextmanager
def truth(relevance: list[list[Tensor]]) -> Iterator[None]:
    """Hand the relevance of the next prefill to `oracle`.

    Parameters
    ----------
    relevance
        Per sample, per span, float (span.length,), as `tokencomp.training.relevance.relevance`
        returns it.
    """
    token = _TRUTH.set(iter([span for row in relevance for span in row]))
    try:
        yield
    finally:
        _TRUTH.reset(token)


@register_reducer("oracle")
@dataclass(frozen=True)
class Oracle(Reducer):
    """Keep the tokens the answer really rests on (labels of arXiv 2506.01097).

    It needs the answer before the prompt is read, so it is no method but what `selector` is
    measured against: call the model inside `with truth(relevance): ...`.
    """

    summary = "upper bound of selector, for evaluation: needs the answer (2506.01097)"

    def reduce(self, tokens: VisualTokens, keep: int) -> Reduction:
        waiting = _TRUTH.get()
        scores = None if waiting is None else next(waiting, None)
        while scores is not None and scores.shape[0] != len(tokens):
            scores = next(waiting, None)  # type: ignore[arg-type]  # spans kept whole are skipped
        if scores is None:
            raise ScoreError(
                "oracle has no relevance for this span. Compute it with "
                "tokencomp.training.relevance.relevance(model, inputs, labels) and call the model "
                "inside `with tokencomp.reducers.oracle.truth(relevance): ...`."
            )
        return Reduction(top_k(scores.to(tokens.features.device), tokens.special, keep))
