"""Attention scores without touching the model's attention backend.

The query rows that vote are recomputed from the layer's own input (`tokencomp.engine.tap`); keys
come from the KV cache. Softmax columns are summed by `tokencomp.kernels.attention_colsum`: no rows
× keys tensor exists. A sliding window of the layer is left out: the scores say what attention each
token would receive if the whole prompt were visible.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from tokencomp.engine import compat
from tokencomp.engine.cache import physical_length, stored_keys
from tokencomp.engine.layout import LiveSpan, RowLayout
from tokencomp.engine.parallel import gather_heads, unsharded
from tokencomp.engine.tap import Past, Tapped, attention_of, tap
from tokencomp.tokens import Attention

# Arguments of a layer that a probe leaves out: it reads one sample, without padding.
LEFT_OUT = ("hidden_states", "attention_mask", "cache_position", *compat.CACHE_NAMES)


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
    cached = _cached_layer(compat.get_cache(kwargs), attn.layer_idx)
    keys = None if cached is None else cached.keys
    past = 0 if keys is None else keys.shape[-2] - hidden.shape[1]
    scores: list[list[Tensor]] = []
    for b, prompts in enumerate(prompts_with_spans(layout)):
        scores.append([])
        for first, stop, spans in prompts:
            probe = _Probe(attn, attn, hidden, kwargs, b, first, stop)
            if keys is None or not probe.caches_keys(keys):
                k = probe.keys(cached, past)
            else:
                k = _with_past(cached, past, b, keys[b, :, past + first : past + stop])
            scores[b] += _span_scores(probe, k, spans, signal)
    return scores


@torch.no_grad()
def input_scores(
    layer: Any,
    hidden: Tensor,
    arguments: Mapping[str, Any],
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
    arguments
        What the layer takes beside it, for the columns of `layout`: `position_embeddings`, and
        `position_ids` if it reads them.

    Returns
    -------
    list per sample of list per span of Tensor, float32, shape (span.count,)
    """
    cached = _cached_layer(cache, index)
    past = physical_length(cached)
    attn = attention_of(layer)
    scores: list[list[Tensor]] = []
    with unsharded(layer):
        for b, prompts in enumerate(prompts_with_spans(layout)):
            scores.append([])
            for first, stop, spans in prompts:
                probe = _Probe(layer, attn, hidden, arguments, b, first, stop)
                k = probe.keys(cached, past)
                scores[b] += _span_scores(probe, k, spans, signal)
    return scores


def prompts_with_spans(layout: RowLayout) -> list[list[tuple[int, int, list[LiveSpan]]]]:
    """Per row: first column, column behind the question, and spans of every prompt with spans."""
    rows = []
    for prompts, spans in zip(layout.prompts, layout.spans, strict=True):
        pairs = [(p, [s for s in spans if p.holds(s)]) for p in prompts]
        rows.append([(p.start, p.question_stop, own) for p, own in pairs if own])
    return rows


class _Probe:
    """One sample's tokens at a layer, `first … stop - 1` of the layout."""

    def __init__(
        self,
        root: Any,
        attn: Any,
        hidden: Tensor,
        arguments: Mapping[str, Any],
        sample: int,
        first: int,
        stop: int,
    ) -> None:
        self.root, self.attn, self.sample, self.first = root, attn, sample, first
        self.width = stop - first
        self._hidden = hidden[sample, first:stop]
        self._arguments = {
            name: _of_sample(value, sample, first, stop, hidden.shape[1], "embeddings" in name)
            for name, value in arguments.items()
            if name not in LEFT_OUT
        }

    def queries(self, rows: Tensor | None) -> Tapped:
        """Queries (1, heads, R, d) of some rows, or of all, and the factor of their product."""
        return self._tap(rows, ("k_proj", "v_proj"))

    def keys(self, cached: Any, past: int) -> Tensor:
        """Keys of all tokens, those of earlier turns (real rows only) first, (kv heads, N, d)."""
        if past and not self.caches_keys(stored_keys(cached)):
            return self._tap(None, ("q_proj",), _past_of(cached, past, self.sample)).key[0]
        current = self._tap(None, ("q_proj", "v_proj")).key[0]
        return _with_past(cached, past, self.sample, current)

    def caches_keys(self, stored: Tensor) -> bool:
        """Whether a cache of these rows holds the keys that attention reads.

        Latent attention may cache what keys are computed from. Its keys have another shape.
        """
        if getattr(self.attn.config, "kv_lora_rank", None) is None:
            return True
        row = torch.zeros(1, dtype=torch.int64, device=self._hidden.device)
        key = self._tap(row, ("q_proj",)).key
        return (stored.shape[1], stored.shape[-1]) == (key.shape[1], key.shape[-1])

    def _tap(self, rows: Tensor | None, skipped: tuple[str, ...], past: Any = None) -> Tapped:
        hidden, arguments = self._hidden, self._arguments
        if rows is not None:
            hidden = hidden[rows]
            arguments = {
                name: _rows_of(value, rows, self.width, "embeddings" in name)
                for name, value in arguments.items()
            }
        caches = {} if past is None else dict.fromkeys(compat.CACHE_NAMES, past)
        return tap(self.root, self.attn, hidden[None], {**arguments, **caches}, skipped)


def _of_sample(value: Any, sample: int, first: int, stop: int, width: int, tables: bool) -> Any:
    """What belongs to columns `first … stop - 1` of one sample, batch axis kept at 1.

    Parameters
    ----------
    tables
        Whether tensors in `value` are rotary tables, (B, n, d) or (3, B, n, d); others are
        (B, n, …) if they follow the columns.
    """
    if isinstance(value, Tensor):
        batch = value.ndim - 3 if tables else 0
        if value.ndim < 2 or value.shape[batch + 1] != width:
            return value
        value = value.narrow(batch, sample if value.shape[batch] > 1 else 0, 1)
        return value.narrow(batch + 1, first, stop - first)
    return _each(value, lambda item: _of_sample(item, sample, first, stop, width, tables))


def _rows_of(value: Any, rows: Tensor, width: int, tables: bool) -> Any:
    """Some columns of what `_of_sample` returned."""
    if isinstance(value, Tensor):
        axis = value.ndim - 2 if tables else 1
        if value.ndim < 2 or value.shape[axis] != width:
            return value
        return value.index_select(axis, rows.to(value.device))
    return _each(value, lambda item: _rows_of(item, rows, width, tables))


def _each(value: Any, change: Callable[[Any], Any]) -> Any:
    """The items of a mapping or tuple changed one by one; anything else as it is."""
    if isinstance(value, Mapping):
        return {key: change(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(change(item) for item in value)
    return value


def _past_of(cached: Any, past: int, sample: int) -> Past:
    """The first `past` rows of one sample in a cache layer, real ones only."""
    keys, values = (t[sample : sample + 1, :, :past] for t in (cached.keys, cached.values))
    valid = getattr(cached, "valid", None)
    if valid is not None:
        real = valid[sample, :past].to(keys.device)
        keys, values = keys[:, :, real], values[:, :, real]
    return Past(keys, values)


def _cached_layer(cache: Any, index: int) -> Any:
    layers = getattr(cache, "layers", None)
    return layers[index] if layers and index < len(layers) else None


def _with_past(cached: Any, past: int, sample: int, current: Tensor) -> Tensor:
    """Keys of earlier turns (real rows only) in front of the sample's own, (kv heads, N, d)."""
    if past == 0:
        return current
    stored, valid = stored_keys(cached)[sample], getattr(cached, "valid", None)
    held = min(past, stored.shape[1])  # a sliding window keeps the last rows alone
    old = stored[:, :held]
    if valid is not None:
        old = old[:, valid[sample, past - held : past].to(old.device)]
    return torch.cat([old.to(current.device), current], dim=1)


def _span_scores(
    probe: _Probe, k: Tensor, spans: list[LiveSpan], signal: Attention
) -> list[Tensor]:
    """Attention to every token of every span, mean over the rows that vote on the span.

    The text after a span votes on it; where there is none, the last row does. Text before a span
    sees nothing of it, attention being causal, so one pass over all text adds exactly 0 there and
    serves all spans: O(text · keys), however many spans. Every way to join heads commutes with the
    division by the number of voters.
    """
    n = probe.width
    if signal.iterations > 1:
        # PageRank needs a query for every key; those of earlier turns are gone.
        k = k[:, k.shape[1] - n :]
    visual = {column - probe.first for s in spans for column in range(s.start, s.start + s.count)}
    text = [i for i in range(spans[0].start - probe.first, n) if i not in visual]
    sums: dict[str, Tensor] = {}
    scores = []
    for span in spans:
        stop = span.start - probe.first + span.count
        later = len(text) - bisect.bisect_left(text, stop)
        rows = "last" if signal.rows == "text" and not later else signal.rows
        if rows not in sums:
            votes = {"text": text, "last": [n - 1], "all": None}[rows]
            sums[rows] = _column_sums(probe, k, votes, signal)
        voters = {"text": later, "last": 1, "all": n}[rows]
        scores.append(sums[rows][stop - span.count : stop] / voters)
    return scores


def _column_sums(probe: _Probe, k: Tensor, votes: list[int] | None, signal: Attention) -> Tensor:
    """Attention to each of the N tokens of the sample, summed over rows `votes` (None: all)."""
    from tokencomp.kernels import attention_colsum, join_heads

    n = probe.width
    offset = k.shape[1] - n
    rows = None if votes is None else torch.tensor(votes, device=k.device)
    tapped = probe.queries(rows)
    sums = attention_colsum(
        tapped.query,
        k[None],
        q_index=offset + (torch.arange(n, device=k.device) if rows is None else rows),
        scale=tapped.scaling,
        temperature=signal.temperature,
        heads="none",
        iterations=max(signal.iterations, 1),
    )[..., offset:]
    return join_heads(gather_heads(probe.attn, sums, dim=1), signal.heads)[0]
