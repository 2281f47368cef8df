"""Comparator: conditional determinantal point process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor
from torch.nn.functional import normalize

from tokencomp.plan.reducer import Traits
from tokencomp.reducers._batch import (
    finite_features,
    means,
    min_max,
    questions,
    spread,
    supplied_scores,
)
from tokencomp.reducers.published import Published
from tokencomp.reducers.registry import register_reducer
from tokencomp.tokens.kept import Kept
from tokencomp.tokens.signals import QUERY, Attention, Signal
from tokencomp.tokens.tokens import Tokens

Relevance = Literal["query", "attention"]
EPS = 1e-6  # relevance is scaled to (0, 1]


@register_reducer("cdpruner")
@dataclass(frozen=True)
class CDPruner(Published):
    """Greedy MAP of a DPP conditioned on the question (CDPruner, arXiv 2506.10967).

    Kernel K = diag(r) · cos(x, x) · diag(r), r the relevance scaled to [0, 1]; tokens are added
    one by one so that log det K of the kept ones grows most (incremental Cholesky, k steps).

    Attributes
    ----------
    relevance
        "query": minus the cosine of a token with the embeddings of the text after the span, mean
        over the text. The paper's formula has no minus sign; the authors' code has one. The authors
        take CLIP's two encoders where the model has them, and otherwise the decoder's embeddings,
        which this reducer always takes. "attention": layer 0's attention of that text (ours).

    Notes
    -----
    Given the same embeddings, it keeps the tokens of the authors' code (120 of 120 random cases)
    while they are at most 0.8 times the feature dimensions. Beyond the rank of the kernel that code
    divides by a determinant that has vanished, and repeats tokens; here the most relevant of the
    remaining ones follow (ours). The authors scale relevance over all tiles of an image together,
    this reducer in every tile. O(n·k²) operations and O(n·k) memory.
    """

    relevance: Relevance = "query"

    revision = 2
    traits = Traits(batched=True)
    summary = "conditional DPP, greedy MAP (CDPruner 2506.10967)"

    @property
    def needs(self) -> frozenset[Signal]:
        return frozenset({QUERY if self.relevance == "query" else Attention("text")})

    def reduce(self, tokens: Tokens) -> Kept:
        from tokencomp.kernels import dpp_select

        scores = None
        if self.relevance == "attention":
            scores = supplied_scores(tokens, "cdpruner")
        unit = normalize(finite_features(tokens.features.float(), scores), dim=1)
        owners = tokens.owners() if len(tokens.lengths) > 1 else None
        r = scores if scores is not None else -likeness(tokens, unit, owners)
        r = min_max(r, tokens.lengths, EPS, owners)
        return Kept(dpp_select(unit, tokens.budgets, r, spans=tokens.lengths))


def likeness(tokens: Tokens, unit: Tensor, owners: Tensor | None) -> Tensor:
    """Mean cosine of every patch with the embeddings of the text after its span."""
    texts, lengths, prompt = questions(tokens, "cdpruner", "divprune")
    own = means(texts, lengths)
    if owners is not None:
        own = own[tokens.table(prompt)]
    # Products and sums row by row: no batch changes a rounding.
    return (unit * spread(own, tokens.lengths, owners)).sum(1)
