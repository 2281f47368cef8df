"""Conditional diversity: relevance × distance from what is already kept. Ours."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from tokencomp.plan.reducer import Traits, effective
from tokencomp.reducers._batch import finite_features, segment, spread, supplied_scores
from tokencomp.reducers.published import Published
from tokencomp.reducers.registry import register_reducer
from tokencomp.tokens.kept import Kept
from tokencomp.tokens.signals import Attention, Signal
from tokencomp.tokens.tokens import Tokens
from tokencomp.validation import check_range

FLOOR = 1e-3
OF_RELEVANCE = effective(
    lambda self, pixels: self.power, "with power=0, which makes all tokens equally relevant"
)


@register_reducer("condiv")
@dataclass(frozen=True)
class ConDiv(Published):
    r"""Greedy choice of tokens that are relevant to the question and unlike those already kept.

    .. math:: next = \arg\max_i \; r_i^p \cdot (m \bar d + \min_{j \in kept} (1 - \cos(x_i, x_j)))

    Attention alone keeps many copies of one thing, and diversity alone keeps outliers; the product
    does neither. With a margin, the second and third of several similar things (objects to be
    counted, for instance) still rank above faint background. Ours; related to DivPrune
    (arXiv 2503.02175) and CDPruner (arXiv 2506.10967).

    Attributes
    ----------
    power
        p, 0 to 8; 0 is plain max-min diversity. Relevance r is layer 0's attention of the text
        after the span, mean over heads and tokens, divided by its largest value and floored at
        1e-3, so that the distance matters at every p.
    margin
        m, 0 to 8: share of the span's mean distance d̄ (over all pairs, those of a token with
        itself included) that is added to every distance. Without effect at power 0.
    """

    power: float = 1.0
    margin: float = field(default=0.2, metadata=OF_RELEVANCE)

    revision = 3  # since then it is the same on all modalities
    traits = Traits(batched=True)
    summary = "greedy: relevance × diversity (ours)"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("condiv", "power", self.power, 0, 8)
        check_range("condiv", "margin", self.margin, 0, 8)

    @property
    def needs(self) -> frozenset[Signal]:
        return frozenset({Attention("text")} if self.power else ())

    def reduce(self, tokens: Tokens) -> Kept:
        from tokencomp.kernels import maxmin_select, mean_distance

        scores = weights = margin = None
        if self.power:
            scores = supplied_scores(tokens, "condiv")
        x = finite_features(tokens.features, scores)
        if scores is not None:
            weights = self._weights(tokens, scores)
            if self.margin:
                margin = self.margin * mean_distance(x, spans=tokens.lengths)
        how = {"spans": tokens.lengths, "margin": margin}
        return Kept(maxmin_select(x, tokens.budgets, weights, **how))

    def _weights(self, tokens: Tokens, scores: Tensor) -> Tensor:
        """Relevance to the power p of every patch, float32."""
        lengths = tokens.lengths
        relevance = scores.clamp(min=0)
        most = segment(relevance, lengths, "max").clamp(min=1e-30)
        return (relevance / spread(most, lengths)).clamp(min=FLOOR).pow(self.power)
