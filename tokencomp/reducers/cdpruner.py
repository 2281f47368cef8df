"""CDPruner: a determinantal point process conditioned on the question (arXiv 2506.10967)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor
from torch.nn.functional import normalize

from tokencomp.reducers import Kept, Published, Tokens, Traits, finite_features, register_reducer
from tokencomp.reducers._batch import means, min_max, questions, spread
from tokencomp.reducers.base import supplied_scores
from tokencomp.tokens.signals import QUERY, Attention, Signal

Relevance = Literal["query", "attention"]
EPS = 1e-6  # smallest scaled relevance


@register_reducer("cdpruner")
@dataclass(frozen=True)
class CDPruner(Published):
    """Greedy MAP of a DPP conditioned on the question (CDPruner, arXiv 2506.10967).

        L    = diag(r) · cos(X, X) · diag(r),   r: relevance, min-max scaled to [0, 1]
        next = argmax_i  log det L_{S ∪ {i}},   S: kept tokens

    by incremental Cholesky decomposition: O(n·k²) operations, O(n·k) memory.

    Deviations from the authors' code, whose sets it keeps for equal embeddings (120 of 120 random
    cases) as long as k is at most 0.8 times the feature dimension:

    - The paper's relevance has no minus sign; the code has one, as here.
    - It compares CLIP's two encoders where the model has them; here it is always the decoder's
      embeddings, its rule for other models.
    - Beyond the rank of L it divides by a vanished determinant and repeats tokens; here the most
      relevant remaining tokens follow (ours).
    - It scales relevance over all tiles of an image; here it is scaled in every tile.

    Attributes
    ----------
    relevance
        "query": minus the mean cosine of a token with the text embeddings after the span.
        "attention": layer 0's attention of that text (ours).
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
        r = scores if scores is not None else -mean_cosine(tokens, unit, owners)
        r = min_max(r, tokens.lengths, EPS, owners)
        return Kept(dpp_select(unit, tokens.budgets, r, spans=tokens.lengths))


def mean_cosine(tokens: Tokens, unit: Tensor, owners: Tensor | None) -> Tensor:
    """Mean cosine of every patch with the embeddings of the text after its span, (n,)."""
    texts, lengths, prompt = questions(tokens, "cdpruner", "divprune")
    mean_text = means(texts, lengths)
    if owners is not None:
        mean_text = mean_text[tokens.table(prompt)]
    # Row by row instead of a matrix product, so that rounding does not depend on the batch.
    return (unit * spread(mean_text, tokens.lengths, owners)).sum(1)
