"""DART: pivot tokens, and the tokens least similar to them (arXiv 2502.11494)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from tokencomp.errors import ScoreError
from tokencomp.plan.counts import check_ratio
from tokencomp.plan.plan import Plan, from_profile
from tokencomp.plan.schedules import NATURAL, SCHEDULES
from tokencomp.reducers import Kept, Published, Tokens, Traits, finite_features, register_reducer
from tokencomp.reducers._batch import distinct, ranked
from tokencomp.reducers.base import supplied_scores
from tokencomp.reducers.published import cut_layers
from tokencomp.tokens.signals import NORM, QUERY, Attention
from tokencomp.tokens.stacks import HostIndex, Stack, by_stack, masked, padded, starts_of
from tokencomp.tokens.tokens import rows_where

PIVOTS = 4  # visual pivots, and as many text pivots


@register_reducer("dart")
@dataclass(frozen=True)
class Dart(Published):
    """Keep pivots with large keys, and for each pivot the tokens least similar to it.

    DART (arXiv 2502.11494), one cut before layer 2. With budget K and the keys k_i of the layer
    before:

        pivots  = the 4 visual tokens, then the 4 text tokens after the span, of largest ‖k_i‖₁
        R(p)    = the ⌈(K - 4) / 8⌉ visual tokens, not kept yet, of smallest cos(h_i, h_p)

    The pivots add R(p) in this order until K tokens are kept. h is the hidden state after the
    model's final norm.

    Deviations from the authors' release:

    - Pivots in order of their keys and an exact count, as in AngelSlim's copy. The release iterates
      over a hash table, on whose order the result depends, and keeps a count besides the budget.
    - Keys are measured before rotation; both codes measure them after it, so that the norm depends
      on where a prompt begins.
    - Where a cut before layer 2 cannot meet the ratio, it comes earlier (ours); at decoder entry
      the keys are those of layer 0.
    """

    traits = Traits(batched=True)
    summary = "pivots and what resembles them least (DART 2502.11494)"
    needs = frozenset({QUERY, NORM, Attention("none")})

    def plan(self, ratio: float, num_layers: int) -> Plan:
        return from_profile(SCHEDULES["fastv"](num_layers, 1.0 - check_ratio(ratio)), self)

    def published_layers(self, num_layers: int) -> tuple[int, ...]:
        return cut_layers(NATURAL["fastv"](num_layers), self)

    def reduce(self, tokens: Tokens) -> Kept:
        key_norms = supplied_scores(tokens, "dart")
        x = finite_features(tokens.features, key_norms)
        if tokens.norm is None or tokens.queries is None or tokens.query_scores is None:
            raise ScoreError(
                "reducer 'dart' needs the text after a span, its keys and the model's final norm. "
                "Run it through tokencomp.patch."
            )
        states = normalize(tokens.norm(x).float(), dim=1)
        pivots, firsts, counts = text_pivots(tokens)
        budgets = np.asarray(tokens.budgets)

        def kept(spans: HostIndex, stack: Stack, states: Tensor, key_norms: Tensor) -> Tensor:
            text = Stack(firsts[spans], counts[spans], x.device)
            return least_alike(stack, states, key_norms, text, text.of(pivots), budgets[spans])

        mask = by_stack(tokens.lengths, kept, states, key_norms)
        return Kept(rows_where(mask, sum(tokens.budgets)))


def text_pivots(tokens: Tokens) -> tuple[Tensor, HostIndex, HostIndex]:
    """Text pivots: unit states, float32 (pivots, d), and which of them belong to a span.

    Returns also, per span, its first pivot and how many it has; the largest key of a text comes
    first.
    """
    assert tokens.queries and tokens.query_scores and tokens.norm
    texts, prompt = distinct(tokens.queries)
    lengths = [len(text) for text in texts]
    keys = torch.cat([tokens.query_scores[prompt.index(n)] for n in range(len(texts))])
    counts = np.minimum(PIVOTS, lengths)
    by_norm = ranked(keys, lengths)
    # The first `counts` rows of every text.
    shift = np.repeat(starts_of(lengths)[:-1] - starts_of(counts)[:-1], counts)
    rows = by_norm[tokens.table(shift + np.arange(len(shift)))]
    states = normalize(tokens.norm(torch.cat(texts).index_select(0, rows)).float(), dim=1)
    return states, starts_of(counts)[prompt], counts[prompt]


def least_alike(
    stack: Stack,
    states: Tensor,
    key_norms: Tensor,
    text: Stack,
    text_states: Tensor,
    budgets: HostIndex,
) -> Tensor:
    """Mask of the kept patches, `budgets` of every span, bool (spans, n).

    From the unit states (spans, n, d) and ‖k‖₁ (spans, n) of the patches of a stack of spans, and
    the unit states (spans, m, d) of their text pivots.
    """
    from tokencomp.kernels import topk_stable

    # The visual pivots: the largest key norms.
    order = masked(key_norms, stack.lengths, -torch.inf).sort(dim=1, descending=True, stable=True)
    first = np.minimum(PIVOTS, budgets)
    pivots = order.indices.gather(1, stack.table(padded([0], first)))
    visual = states.gather(1, pivots[..., None].expand(-1, -1, states.shape[2]))
    missing = budgets - first
    share = -(-missing // (first + text.lengths))  # 0 where the budget is spent on pivots
    # Kept tokens and padding have inf, so that they are not chosen again.
    kept = masked(torch.zeros_like(key_norms), stack.lengths, torch.inf)
    kept = kept.scatter_(1, pivots, torch.inf).flatten()
    # Pivot by pivot, visual before text: add the tokens of smallest cosine.
    dissimilarity = -(torch.cat([visual, text_states], 1) @ states.mT)
    for of_pivot in dissimilarity.transpose(0, 1).flatten(1).unbind():
        more = np.minimum(share, missing)
        if not more.any():
            break
        rows = topk_stable(of_pivot - kept, more.tolist(), spans=stack.longest)
        kept.index_fill_(0, rows, torch.inf)
        missing = missing - more
    return (kept > 0).view(key_norms.shape)
