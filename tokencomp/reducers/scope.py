"""SCOPE: saliency × coverage (arXiv 2510.24214)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch.nn.functional import normalize

from tokencomp.reducers import Kept, Reducer, Tokens, Traits, finite_features, register_reducer
from tokencomp.reducers.base import tower_signal
from tokencomp.tokens.signals import TOWER_ATTENTION, Signal


@register_reducer("scope")
@dataclass(frozen=True)
class Scope(Reducer):
    """Greedy choice of salient tokens that cover tokens unlike those already kept.

    SCOPE (arXiv 2510.24214), with the attention a_j that the vision tower pays to token j (α = 1):

        next = argmax_j  a_j · Σ_i max(0, cos(x_i, x_j) - max over kept c of cos(x_i, x_c))

    This is facility location with a factor per token.

    Deviations from the release, besides which the rule gave its sets in 60 of 60 random cases:

    - Features are those after the projector, as in its copy for Qwen; for LLaVA it takes those
      before the projector.
    - Attention is read from the last block in use, as there for LLaVA, averaged over a token's
      patches.

    Attributes
    ----------
    saliency
        "tower": as published. "none": a = 1, plain facility location (ours), which needs no signal
        and therefore runs in servers and in the vision tower.
    """

    saliency: Literal["tower", "none"] = "tower"

    traits = Traits(batched=True)
    summary = "saliency × covering (SCOPE 2510.24214), saliency=none: facility location"

    @property
    def needs(self) -> frozenset[Signal]:
        return frozenset({TOWER_ATTENTION} if self.saliency == "tower" else ())

    def reduce(self, tokens: Tokens) -> Kept:
        from tokencomp.kernels import facility_select

        weights = None
        if self.saliency == "tower":
            weights = tower_signal(tokens, TOWER_ATTENTION, "scope")
        unit = normalize(finite_features(tokens.features, weights).float(), dim=1)
        return Kept(facility_select(unit, tokens.budgets, weights, spans=tokens.lengths))
