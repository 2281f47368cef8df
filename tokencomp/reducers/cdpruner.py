"""Comparator: conditional determinantal point process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import normalize

from tokencomp.errors import ScoreError
from tokencomp.reducers._rows import (
    finite_values,
    keep_patches,
    patch_rows,
    signal_scores,
)
from tokencomp.reducers.base import Reducer
from tokencomp.reducers.registry import register_reducer
from tokencomp.tokens import QUERY, Attention, Reduction, Signal, VisualTokens

Relevance = Literal["query", "attention", "none"]
RELEVANCE: tuple[Relevance, ...] = get_args(Relevance)
EPS = 1e-6


@register_reducer("cdpruner")
@dataclass(frozen=True)
class CDPruner(Reducer):
    """Greedy MAP of a DPP conditioned on the question (CDPruner, arXiv 2506.10967).

    Kernel K = diag(r) · cos(x, x) · diag(r), r the relevance scaled to [0, 1]; tokens are added
    one by one so that log det K of the kept ones grows most (incremental Cholesky, k steps).

    Attributes
    ----------
    relevance
        "query": minus the cosine of a token with the embeddings of the text after the span, mean
        over the text. The paper's formula has no minus sign; its code in public projects has one.
        The authors take CLIP's two encoders where the model has them, and otherwise the decoder's
        embeddings, which this reducer always takes. "attention": layer 0's attention of that text
        (ours).
        "none": an unconditional DPP, question-agnostic.

    Notes
    -----
    Once the kernel's rank is used up (more tokens kept than feature dimensions), the most
    relevant of the remaining tokens follow (ours). O(n·k²) operations and O(n·k) memory.
    """

    relevance: Relevance = "query"

    revision = 2
    summary = "conditional DPP, greedy MAP (CDPruner 2506.10967)"

    @property
    def needs(self) -> frozenset[Signal]:
        signals: dict[str, Signal] = {"query": QUERY, "attention": Attention("text")}
        return frozenset({signals[self.relevance]} if self.relevance in signals else ())

    def reduce(self, tokens: VisualTokens, keep: int) -> Reduction:
        rows, budget = patch_rows(tokens, keep)
        x = tokens.features[rows].float()
        finite_values(x.norm(dim=1), "feature norms")
        r = self._relevance(tokens, rows, x)
        return keep_patches(tokens, rows[greedy_map(normalize(x, dim=1), r, budget)])

    def _relevance(self, tokens: VisualTokens, rows: Tensor, x: Tensor) -> Tensor:
        if self.relevance == "none":
            return torch.ones_like(x[:, 0])
        if self.relevance == "attention":
            r = signal_scores(tokens, "cdpruner")[rows]
        elif tokens.query is None or not len(tokens.query):
            raise ScoreError(
                "cdpruner compares visual tokens with the text after them, and there is none. Put "
                "the question after the image, or use relevance='none'."
            )
        else:
            r = -normalize(x, dim=1) @ normalize(tokens.query.float(), dim=1).mean(0)
        return (r - r.min() + EPS) / (r.max() - r.min() + EPS)


def greedy_map(unit: Tensor, r: Tensor, k: int) -> Tensor:
    """k rows of unit (n, d), in order of choice, that greedily maximise det(r·unit·unitᵀ·r)."""
    n = unit.shape[0]
    gain = r * r
    factors = unit.new_zeros(max(k, 1), n)
    chosen = torch.empty(k, dtype=torch.int64, device=unit.device)
    taken = torch.zeros(n, dtype=torch.bool, device=unit.device)
    for i in range(k):
        # Directions that are used up rank below all others, by relevance.
        score = torch.where(gain > EPS * r * r, gain, r - 2.0).masked_fill(taken, -torch.inf)
        best = score.argmax()
        chosen[i], taken[best] = best, True
        row = r[best] * r * (unit @ unit[best]) - factors[:i, best] @ factors[:i]
        fresh = gain[best] > EPS * r[best] ** 2
        factors[i] = torch.where(fresh, row / gain[best].clamp(min=1e-20).sqrt(), 0.0)
        gain = gain - factors[i] ** 2
    return chosen
