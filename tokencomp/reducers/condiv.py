"""Conditional diversity: relevance × distance to the kept tokens (ours)."""

from __future__ import annotations

from dataclasses import dataclass, field

from tokencomp.plan.options import effective
from tokencomp.reducers import Kept, Published, Tokens, Traits, finite_features, register_reducer
from tokencomp.reducers._batch import segment, spread
from tokencomp.reducers.base import supplied_scores
from tokencomp.tokens.signals import Attention, Signal
from tokencomp.validation import between

FLOOR = 1e-3  # smallest relevance
OF_RELEVANCE = effective(
    lambda self, pixels: self.power, "with power=0, which makes all tokens equally relevant"
)


@register_reducer("condiv")
@dataclass(frozen=True)
class ConDiv(Published):
    """Greedy choice of tokens that are relevant to the question and unlike those already kept.

        next = argmax_i  r_i^p · (m·d̄ + min over kept j of (1 - cos(x_i, x_j)))

    Attention alone keeps near-duplicates, and diversity alone keeps outliers; the product does
    neither. With a margin m·d̄, the second and third of several similar objects (to be counted, for
    instance) still rank above faint background. Ours; related to DivPrune (arXiv 2503.02175) and
    CDPruner (arXiv 2506.10967).

    Attributes
    ----------
    power
        p, 0 to 8; 0 is plain max-min diversity. Relevance r is layer 0's attention of the text
        after the span, mean over heads and text tokens, divided by its maximum in the span and at
        least 1e-3.
    margin
        m, 0 to 8: share of the mean distance d̄ over all pairs of the span (self-pairs included)
        that is added to every distance. Without effect at power 0.
    """

    power: float = field(default=1.0, metadata=between(0, 8))
    margin: float = field(default=0.2, metadata=OF_RELEVANCE | between(0, 8))

    revision = 3  # 3: one rule for all modalities
    traits = Traits(batched=True)
    summary = "greedy: relevance × diversity (ours)"

    @property
    def needs(self) -> frozenset[Signal]:
        return frozenset({Attention("text")} if self.power else ())

    def reduce(self, tokens: Tokens) -> Kept:
        from tokencomp.kernels import maxmin_select, mean_distance

        scores = weights = margin = None
        if self.power:
            scores = supplied_scores(tokens, "condiv")
        x = finite_features(tokens.features, scores)
        # Weights r^p and margin m · d̄; without them it is a plain max-min selection.
        if scores is not None:
            r = scores.clamp(min=0)
            most = segment(r, tokens.lengths, "max").clamp(min=1e-30)
            weights = (r / spread(most, tokens.lengths)).clamp(min=FLOOR).pow(self.power)
            if self.margin:
                margin = self.margin * mean_distance(x, spans=tokens.lengths)
        how = {"spans": tokens.lengths, "margin": margin}
        return Kept(maxmin_select(x, tokens.budgets, weights, **how))
