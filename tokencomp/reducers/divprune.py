"""Comparator: max-min diversity."""

from __future__ import annotations

from dataclasses import dataclass

from tokencomp.plan.reducer import Traits
from tokencomp.reducers._batch import finite_features
from tokencomp.reducers.base import Reducer
from tokencomp.reducers.registry import register_reducer
from tokencomp.tokens.kept import Kept
from tokencomp.tokens.tokens import Tokens


@register_reducer("divprune")
@dataclass(frozen=True)
class DivPrune(Reducer):
    r"""Greedy max-min diversity (DivPrune, arXiv 2503.02175).

    .. math:: next = \arg\max_i \min_{j \in kept} (1 - \cos(x_i, x_j))

    The first token is the one whose nearest neighbour is farthest. Tokens are chosen per span: a
    video spends its budget on the frames that differ. Models that get every frame of a video, or
    every tile of an image, as a span of its own (InternVL, SmolVLM) keep the same share of each.
    """

    traits = Traits(batched=True)
    summary = "greedy max-min cosine distance (DivPrune 2503.02175)"

    def reduce(self, tokens: Tokens) -> Kept:
        from tokencomp.kernels import maxmin_select

        x = finite_features(tokens.features)
        return Kept(maxmin_select(x, tokens.budgets, spans=tokens.lengths, start="isolated"))
