"""Attention scores without touching the model's attention backend.

The query rows that vote are recomputed from the layer's own input; keys come from the KV cache.
Softmax columns are summed by `tokencomp.kernels.attention_colsum`: no rows × keys tensor exists.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tokencomp.engine import compat
from tokencomp.engine.cache import physical_length, stored_keys
from tokencomp.engine.layout import LiveSpan, RowLayout
from tokencomp.engine.parallel import gather_heads, unsharded
from tokencomp.tokens import Attention


@torch.no_grad()  # scores only choose; a checkpointed layer would also record them just once
def layer_scores(
    attn: Any,
    kwargs: Mapping[str, Any],
    signal: Attention,
    layout: RowLayout,
) -> list[list[Tensor]]:
    """Scores of every live span from a self-attention call that has just run.

    Parameters
    ----------
    attn, kwargs
        The self-attention module and the arguments of its call (normed hidden states, rotary
        tables, cache).
    layout
        Only the question of every prompt votes and counts, see `Prompt.trailing`.

    Returns
    -------
    list per sample of list per span of Tensor, float32, shape (span.count,)
    """
    hidden = kwargs["hidden_states"]
    cos, sin = kwargs["position_embeddings"]
    cached = _cached_layer(compat.get_cache(kwargs), attn.layer_idx)
    keys = None if cached is None else cached.keys
    past = 0 if keys is None else keys.shape[-2] - hidden.shape[1]
    scores: list[list[Tensor]] = []
    for b, prompts in enumerate(prompts_with_spans(layout)):
        scores.append([])
        for first, stop, spans in prompts:
            row = _Row(attn, hidden[b, first:stop], cos, sin, b, first, stop)
            if keys is None:
                k = row.keys()
            else:
                k = _with_past(cached, past, b, keys[b, :, past + first : past + stop])
            scores[b] += _span_scores(row, k, spans, signal)
    return scores


@torch.no_grad()
def input_scores(
    layer: Any,
    hidden: Tensor,
    tables: tuple[Tensor, Tensor],
    signal: Attention,
    layout: RowLayout,
    cache: Any = None,
    index: int = 0,
) -> list[list[Tensor]]:
    """Scores from decoder layer `index` before it runs: its input norm, q, k and RoPE only.

    Parameters
    ----------
    layer
        The decoder layer.
    hidden : Tensor, shape (B, n, d)
        Its input.
    tables
        Rotary tables of the columns of `layout`.

    Returns
    -------
    list per sample of list per span of Tensor, float32, shape (span.count,)
    """
    cached = _cached_layer(cache, index)
    past = physical_length(cached)
    scores: list[list[Tensor]] = []
    with unsharded(layer):
        for b, prompts in enumerate(prompts_with_spans(layout)):
            scores.append([])
            for first, stop, spans in prompts:
                normed = layer.input_layernorm(hidden[b : b + 1, first:stop])[0]
                row = _Row(layer.self_attn, normed, *tables, b, first, stop)
                k = _with_past(cached, past, b, row.keys())
                scores[b] += _span_scores(row, k, spans, signal)
    return scores


def prompts_with_spans(layout: RowLayout) -> list[list[tuple[int, int, list[LiveSpan]]]]:
    """Per row: first column, column behind the question, and spans of every prompt with spans."""
    rows = []
    for prompts, spans in zip(layout.prompts, layout.spans, strict=True):
        pairs = [(p, [s for s in spans if p.holds(s)]) for p in prompts]
        rows.append([(p.start, p.question_stop, own) for p, own in pairs if own])
    return rows


class _Row:
    """One sample's tokens at a layer, `first … stop - 1` of the layout."""

    def __init__(
        self,
        attn: Any,
        hidden: Tensor,
        cos: Tensor,
        sin: Tensor,
        sample: int,
        first: int,
        stop: int,
    ) -> None:
        self.attn, self.hidden, self.first = attn, hidden, first
        self.tables = tuple(_rows_of(t, sample, first, stop) for t in (cos, sin))

    def queries(self, rows: Tensor | None) -> Tensor:
        """Rotated queries, shape (1, heads, R, d)."""
        return self._project("q", rows)

    def keys(self) -> Tensor:
        """Rotated keys of all tokens, shape (kv heads, N, d)."""
        return self._project("k", None)[0]

    def _project(self, which: str, rows: Tensor | None) -> Tensor:
        hidden, (cos, sin) = self.hidden, self.tables
        if rows is not None:
            hidden = hidden[rows]
            cos, sin = (t.index_select(compat.sequence_dim(t), rows) for t in (cos, sin))
        attn = self.attn
        x = getattr(attn, f"{which}_proj")(hidden[None])
        x = x.view(1, hidden.shape[0], -1, attn.head_dim)
        norm = getattr(attn, f"{which}_norm", None)
        if norm is not None:
            x = norm(x)
        return compat.rotate(attn, x.transpose(1, 2), cos, sin)


def _rows_of(table: Tensor, sample: int, first: int, stop: int) -> Tensor:
    """Rotary table of one sample's tokens, batch axis kept at 1."""
    batch = table.ndim - 3
    table = table.select(batch, sample if table.shape[batch] > 1 else 0).unsqueeze(batch)
    return table.narrow(compat.sequence_dim(table), first, stop - first)


def _cached_layer(cache: Any, index: int) -> Any:
    layers = getattr(cache, "layers", None)
    return layers[index] if layers and index < len(layers) else None


def _with_past(cached: Any, past: int, sample: int, current: Tensor) -> Tensor:
    """Keys of earlier turns (real rows only) in front of the sample's own, (kv heads, N, d)."""
    if past == 0:
        return current
    old, valid = stored_keys(cached)[sample, :, :past], getattr(cached, "valid", None)
    if valid is not None:
        old = old[:, valid[sample, :past].to(old.device)]
    return torch.cat([old.to(current.device), current], dim=1)


def _span_scores(row: _Row, k: Tensor, spans: list[LiveSpan], signal: Attention) -> list[Tensor]:
    """Attention to every token of every span, mean over the rows that vote on the span.

    The text after a span votes on it; where there is none, the last row does. Text before a span
    sees nothing of it, attention being causal, so one pass over all text adds exactly 0 there and
    serves all spans: O(text · keys), however many spans. Every way to join heads commutes with the
    division by the number of voters.
    """
    n = row.hidden.shape[0]
    if signal.iterations > 1:
        # PageRank needs a query for every key; those of earlier turns are gone.
        k = k[:, k.shape[1] - n :]
    visual = {column - row.first for s in spans for column in range(s.start, s.start + s.count)}
    text = [i for i in range(spans[0].start - row.first, n) if i not in visual]
    sums: dict[str, Tensor] = {}
    scores = []
    for span in spans:
        stop = span.start - row.first + span.count
        later = len(text) - bisect.bisect_left(text, stop)
        rows = "last" if signal.rows == "text" and not later else signal.rows
        if rows not in sums:
            votes = {"text": text, "last": [n - 1], "all": None}[rows]
            sums[rows] = _column_sums(row, k, votes, signal)
        voters = {"text": later, "last": 1, "all": n}[rows]
        scores.append(sums[rows][stop - span.count : stop] / voters)
    return scores


def _column_sums(row: _Row, k: Tensor, votes: list[int] | None, signal: Attention) -> Tensor:
    """Attention to each of the N tokens of the sample, summed over rows `votes` (None: all)."""
    from tokencomp.kernels import attention_colsum, join_heads

    n = row.hidden.shape[0]
    offset = k.shape[1] - n
    rows = None if votes is None else torch.tensor(votes, device=k.device)
    sums = attention_colsum(
        row.queries(rows),
        k[None],
        q_index=offset + (torch.arange(n, device=k.device) if rows is None else rows),
        scale=float(row.attn.scaling),
        temperature=signal.temperature,
        heads="none",
        iterations=max(signal.iterations, 1),
    )[..., offset:]
    return join_heads(gather_heads(row.attn, sums, dim=1), signal.heads)[0]
