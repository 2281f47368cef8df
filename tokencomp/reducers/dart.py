"""Comparator: few pivots, and what resembles them least."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from tokencomp.errors import ScoreError
from tokencomp.plan.counts import check_ratio
from tokencomp.plan.plan import Plan, from_profile
from tokencomp.plan.schedules import NATURAL, SCHEDULES
from tokencomp.reducers._batch import Patches
from tokencomp.reducers._rows import finite_features, supplied_scores
from tokencomp.reducers.published import Published
from tokencomp.reducers.registry import register_reducer
from tokencomp.tokens.reduction import Reduction
from tokencomp.tokens.signals import NORM, QUERY, Attention, Signal
from tokencomp.tokens.spans import SpanBatch

PIVOTS = 4  # of the visual tokens, and as many of the text


@register_reducer("dart")
@dataclass(frozen=True)
class Dart(Published):
    """Keep pivots with long keys, and for each pivot the tokens that resemble it least.

    DART (arXiv 2502.11494), one cut before layer 2. Pivots are the 4 visual tokens with the largest
    sum of absolute values of their keys in the layer before, then the 4 such tokens of the text
    after the span. Each pivot in turn adds the ceil((K - 4) / 8) visual tokens not yet chosen of
    smallest cosine to it, until K stay; hidden states are compared behind the model's final norm.

    Notes
    -----
    Pivots in this order, largest key first, and the exact count are those of AngelSlim's copy; the
    authors' release goes through the pivots in the order of a hash table, on which the result
    depends, and keeps a count beside the budget. Both measure keys after rotation; here they are
    measured before it, because the sum would else depend on where a prompt begins. Where a cut
    before layer 2 cannot meet the ratio, it comes earlier (ours); at decoder entry the keys are
    those of layer 0. Spans come one by one, so that calls grow with the number of spans.
    """

    summary = "pivots and what resembles them least (DART 2502.11494)"

    @property
    def needs(self) -> frozenset[Signal]:
        return frozenset({QUERY, NORM, Attention("none")})

    def plan(self, ratio: float, num_layers: int) -> Plan:
        return from_profile(SCHEDULES["fastv"](num_layers, 1.0 - check_ratio(ratio)), self)

    def published_layers(self, num_layers: int) -> tuple[int, ...]:
        stages = from_profile(NATURAL["fastv"](num_layers), self).stages
        return tuple(stage.layer for stage in stages)

    def reduce_batch(self, batch: SpanBatch, keeps: Sequence[int]) -> Reduction:
        patches = Patches.of(batch, keeps)
        lengths = patches.of_patches(supplied_scores(batch, "dart"))
        x = finite_features(patches.features, lengths)
        if batch.norm is None or batch.queries is None or batch.query_scores is None:
            raise ScoreError(
                "reducer 'dart' needs the text after a span, its keys and the model's final norm. "
                "Run it through tokencomp.patch."
            )
        spans = zip(
            x.split(patches.lengths), lengths.split(patches.lengths), batch.queries,
            batch.query_scores, patches.budgets, patches.starts, strict=True,
        )  # fmt: skip
        chosen = []
        for own, own_lengths, text, text_lengths, budget, start in spans:
            states = [normalize(batch.norm(own).float(), dim=1)]
            pivots = longest(own_lengths, min(PIVOTS, budget))
            directions = [states[0].index_select(0, pivots)]
            if text is not None and len(text):
                rows = longest(text_lengths, min(PIVOTS, len(text)))
                directions.append(normalize(batch.norm(text.index_select(0, rows)).float(), dim=1))
            chosen.append(start + self._least_alike(states[0], pivots, directions, budget))
        return patches.kept(torch.cat(chosen))

    def _least_alike(
        self, states: Tensor, pivots: Tensor, directions: list[Tensor], budget: int
    ) -> Tensor:
        """Patches of one span that stay, `budget` in all, ascending."""
        from tokencomp.kernels import topk_stable

        taken = torch.zeros(len(states), device=states.device).index_fill_(0, pivots, torch.inf)
        every = torch.cat(directions)
        share, left = -(-(budget - len(pivots)) // len(every)), budget - len(pivots)
        for cosines in every @ states.T:
            more = min(share, left)
            if more <= 0:
                break
            rows = topk_stable(-cosines - taken, more)
            taken, left = taken.index_fill(0, rows, torch.inf), left - more
        chosen: Tensor = topk_stable(taken, budget)
        return chosen


def longest(lengths: Tensor, count: int) -> Tensor:
    """The rows of the `count` largest of lengths (n,), largest first, ties to the lower row."""
    return lengths.sort(descending=True, stable=True).indices[:count]
