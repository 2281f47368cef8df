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

from tokencomp import _compat
from tokencomp.cache import physical_length
from tokencomp.context import Attention
from tokencomp.ragged import Frame, LiveSpan


def layer_scores(
    attn: Any,
    kwargs: Mapping[str, Any],
    signal: Attention,
    frame: Frame,
    draft: int,
) -> list[list[Tensor]]:
    """Scores of every live span from a self-attention call that has just run.

    Parameters
    ----------
    attn, kwargs
        The self-attention module and the arguments of its call (normed hidden states, rotary
        tables, cache).
    draft
        Trailing columns that are speculative tokens, not prompt: they neither vote nor count.

    Returns
    -------
    list per sample of list per span of Tensor, float32, shape (span.count,)
    """
    hidden = kwargs["hidden_states"]
    cos, sin = kwargs["position_embeddings"]
    cached = _cached_layer(_compat.get_cache(kwargs), attn.layer_idx)
    keys = None if cached is None else cached.keys
    past = 0 if keys is None else keys.shape[-2] - hidden.shape[1]
    scores: list[list[Tensor]] = []
    for b, spans in enumerate(frame.spans):
        if not spans:
            scores.append([])
            continue
        first, stop = frame.width - frame.lengths[b], frame.width - draft
        row = _Row(attn, hidden[b, first:stop], cos, sin, b, first, stop)
        if keys is None:
            k = row.keys()
        else:
            k = _with_past(cached, past, b, keys[b, :, past + first : past + stop])
        scores.append(_span_scores(row, k, spans, signal))
    return scores


def entry_scores(
    layer: Any,
    hidden: Tensor,
    tables: tuple[Tensor, Tensor],
    signal: Attention,
    frame: Frame,
    draft: int,
    cache: Any = None,
) -> list[list[Tensor]]:
    """Scores from layer 0 before it runs: its input norm, q, k and RoPE only."""
    cached = _cached_layer(cache, 0)
    past = physical_length(cached)
    scores: list[list[Tensor]] = []
    for b, spans in enumerate(frame.spans):
        first, stop = frame.width - frame.lengths[b], frame.width - draft
        if not spans:
            scores.append([])
            continue
        normed = layer.input_layernorm(hidden[b : b + 1, first:stop])[0]
        row = _Row(layer.self_attn, normed, *tables, b, first, stop)
        scores.append(_span_scores(row, _with_past(cached, past, b, row.keys()), spans, signal))
    return scores


class _Row:
    """One sample's tokens at a layer, `first … stop - 1` of the frame."""

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
            cos, sin = (t.index_select(_compat.sequence_dim(t), rows) for t in (cos, sin))
        attn = self.attn
        x = getattr(attn, f"{which}_proj")(hidden[None])
        x = x.view(1, hidden.shape[0], -1, attn.head_dim)
        norm = getattr(attn, f"{which}_norm", None)
        if norm is not None:
            x = norm(x)
        return _compat.rotate(attn, x.transpose(1, 2), cos, sin)


def _rows_of(table: Tensor, sample: int, first: int, stop: int) -> Tensor:
    """Rotary table of one sample's tokens, batch axis kept at 1."""
    batch = table.ndim - 3
    table = table.select(batch, sample if table.shape[batch] > 1 else 0).unsqueeze(batch)
    return table.narrow(_compat.sequence_dim(table), first, stop - first)


def _cached_layer(cache: Any, index: int) -> Any:
    layers = getattr(cache, "layers", None)
    return layers[index] if layers and index < len(layers) else None


def _with_past(cached: Any, past: int, sample: int, current: Tensor) -> Tensor:
    """Keys of earlier turns (real rows only) in front of the sample's own, (kv heads, N, d)."""
    if past == 0:
        return current
    old, valid = cached.keys[sample, :, :past], getattr(cached, "valid", None)
    if valid is not None:
        old = old[:, valid[sample, :past].to(old.device)]
    return torch.cat([old.to(current.device), current], dim=1)


def _span_scores(row: _Row, k: Tensor, spans: list[LiveSpan], signal: Attention) -> list[Tensor]:
    from tokencomp.kernels import attention_colsum

    n, device = row.hidden.shape[0], k.device
    offset = k.shape[1] - n
    if signal.iterations > 1:
        # PageRank needs a query for every key; those of earlier turns are gone.
        k, offset = k[:, offset:], 0
    visual = {column - row.first for s in spans for column in range(s.start, s.start + s.count)}
    text = [i for i in range(n) if i not in visual]
    cached: dict[Any, Tensor] = {}
    scores = []
    for span in spans:
        stop = span.start - row.first + span.count
        votes = _voters(signal, stop, n, text)
        key = None if votes is None else tuple(votes)
        if key not in cached:
            rows = None if votes is None else torch.tensor(votes, device=device)
            q = row.queries(rows)
            at = torch.arange(n, device=device) if rows is None else rows
            weights = torch.full((q.shape[2],), 1.0 / q.shape[2], device=device)
            cached[key] = attention_colsum(
                q,
                k[None],
                weights,
                q_index=at + offset,
                scale=float(row.attn.scaling),
                temperature=signal.temperature,
                heads=signal.heads,
                iterations=max(signal.iterations, 1),
            )[0, offset:]
        scores.append(cached[key][stop - span.count : stop])
    return scores


def _voters(signal: Attention, stop: int, n: int, text: list[int]) -> list[int] | None:
    """Which of `n` query rows vote on a span ending at `stop`; None: all. `text` ascends."""
    if signal.rows == "all":
        return None
    if signal.rows == "last":
        return [n - 1]
    return text[bisect.bisect_left(text, stop) :] or [n - 1]
