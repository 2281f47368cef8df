"""DivPrune: max-min diversity (arXiv 2503.02175)."""

from __future__ import annotations

from dataclasses import dataclass

from tokencomp.reducers import Kept, Reducer, Tokens, Traits, finite_features, register_reducer


@register_reducer("divprune")
@dataclass(frozen=True)
class DivPrune(Reducer):
    """Greedy max-min diversity (DivPrune, arXiv 2503.02175).

        next = argmax_i  min over kept j of (1 - cos(x_i, x_j))

    The first token is the one whose nearest neighbour is farthest. Tokens are chosen per span: a
    video spends its budget on frames that differ. Models whose spans are frames or tiles (InternVL,
    SmolVLM) keep the same share of each.
    """

    traits = Traits(batched=True)
    summary = "greedy max-min cosine distance (DivPrune 2503.02175)"

    def reduce(self, tokens: Tokens) -> Kept:
        from tokencomp.kernels import maxmin_select

        x = finite_features(tokens.features)
        return Kept(maxmin_select(x, tokens.budgets, spans=tokens.lengths, start="isolated"))
