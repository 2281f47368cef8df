"""Comparator: few pivots, and what resembles them least."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from tokencomp.errors import ScoreError
from tokencomp.plan.counts import check_ratio
from tokencomp.plan.plan import Plan, from_profile
from tokencomp.plan.reducer import Traits
from tokencomp.plan.schedules import NATURAL, SCHEDULES
from tokencomp.reducers._batch import distinct, finite_features, ranked, supplied_scores
from tokencomp.reducers.published import Published
from tokencomp.reducers.registry import register_reducer
from tokencomp.tokens.kept import Kept
from tokencomp.tokens.signals import NORM, QUERY, Attention, Signal
from tokencomp.tokens.stacks import HostIndex, Stack, by_stack, masked, padded, starts_of
from tokencomp.tokens.tokens import Tokens, rows_where

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
    those of layer 0.
    """

    traits = Traits(batched=True)
    summary = "pivots and what resembles them least (DART 2502.11494)"

    @property
    def needs(self) -> frozenset[Signal]:
        return frozenset({QUERY, NORM, Attention("none")})

    def plan(self, ratio: float, num_layers: int) -> Plan:
        return from_profile(SCHEDULES["fastv"](num_layers, 1.0 - check_ratio(ratio)), self)

    def published_layers(self, num_layers: int) -> tuple[int, ...]:
        stages = from_profile(NATURAL["fastv"](num_layers), self).stages
        return tuple(stage.layer for stage in stages)

    def reduce(self, tokens: Tokens) -> Kept:
        lengths = supplied_scores(tokens, "dart")
        x = finite_features(tokens.features, lengths)
        if tokens.norm is None or tokens.queries is None or tokens.query_scores is None:
            raise ScoreError(
                "reducer 'dart' needs the text after a span, its keys and the model's final norm. "
                "Run it through tokencomp.patch."
            )
        states = normalize(tokens.norm(x).float(), dim=1)
        directions, firsts, counts = text_pivots(tokens)

        budgets = np.asarray(tokens.budgets)

        def stays(spans: HostIndex, stack: Stack, states: Tensor, lengths: Tensor) -> Tensor:
            text = Stack(firsts[spans], counts[spans], x.device)
            return least_alike(stack, states, lengths, text, text.of(directions), budgets[spans])

        mask = by_stack(tokens.lengths, stays, states, lengths)
        return Kept(rows_where(mask, sum(tokens.budgets)))


def text_pivots(tokens: Tokens) -> tuple[Tensor, HostIndex, HostIndex]:
    """Unit states of the tokens with the longest keys of all texts, and which of them a span has.

    They are float32 (tokens, d), longest key of a text first; the first one of every span, and how
    many it has.
    """
    assert tokens.queries and tokens.query_scores and tokens.norm
    texts, prompt = distinct(tokens.queries)
    lengths = [len(text) for text in texts]
    keys = torch.cat([tokens.query_scores[prompt.index(n)] for n in range(len(texts))])
    counts = np.minimum(PIVOTS, lengths)
    places = np.repeat(starts_of(lengths)[:-1] - starts_of(counts)[:-1], counts)
    longest = ranked(keys, lengths)
    rows = longest[torch.from_numpy(places + np.arange(len(places))).to(longest.device)]
    states = normalize(tokens.norm(torch.cat(texts).index_select(0, rows)).float(), dim=1)
    return states, starts_of(counts)[prompt], counts[prompt]


def least_alike(
    stack: Stack,
    states: Tensor,
    lengths: Tensor,
    text: Stack,
    directions: Tensor,
    budgets: HostIndex,
) -> Tensor:
    """Which patches stay, `budgets` of every span, bool (spans, n).

    `stack` are the spans, with unit states (spans, n, d) and lengths of keys (spans, n), and `text`
    the pivots of their texts, with unit states `directions` (spans, m, d).
    """
    from tokencomp.kernels import topk_stable

    order = masked(lengths, stack.lengths, -torch.inf).sort(dim=1, descending=True, stable=True)
    first = np.minimum(PIVOTS, budgets)
    pivots = order.indices.gather(1, torch.from_numpy(padded([0], first)).to(states.device))
    own = states.gather(1, pivots[..., None].expand(-1, -1, states.shape[2]))
    left = budgets - first
    share = -(-left // (first + text.lengths))  # where a pivot is missing, none is left to add
    taken = masked(torch.zeros_like(lengths), stack.lengths, torch.inf)
    taken = taken.scatter_(1, pivots, torch.inf).flatten()
    unlike = -(torch.cat([own, directions], 1) @ states.mT)
    for apart in unlike.transpose(0, 1).flatten(1).unbind():
        more = np.minimum(share, left)
        if not more.any():
            break
        rows = topk_stable(apart - taken, more.tolist(), spans=stack.longest)
        taken.index_fill_(0, rows, torch.inf)
        left = left - more
    return (taken > 0).view(lengths.shape)
