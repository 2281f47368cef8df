"""Attention scores, computed without changing the model's attention backend.

Queries of the voting rows are recomputed from the input of the layer (`tokencomp.engine.capture`);
keys come from the KV cache. `tokencomp.kernels.attention_colsum` sums the columns of the softmax
without a rows × keys tensor. Sliding windows and indexers of the layer are ignored: the scores are
the attention that each token would receive if the whole prompt were visible.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicSlidingWindowLayer

from tokencomp.engine.cache import is_reference, physical_length
from tokencomp.engine.capture import Probe, attention_of, questions_of, with_past
from tokencomp.engine.rowmap import (
    RowMap,
    kept_values,
    move_tables,
    text_values,
    visual_values,
)
from tokencomp.tokens.signals import Attention
from tokencomp.tokens.stacks import HostIndex
from tokencomp.torchlib import compat
from tokencomp.torchlib.parallel import gather_heads, unsharded


@torch.no_grad()  # scores select rows, and carry no gradient
def layer_scores(
    attn: Any,
    kwargs: Mapping[str, Any],
    signal: Attention,
    rows: RowMap,
    raters: Tensor | None = None,
    past: RowMap | None = None,
) -> Tensor:
    """Scores of every span from a self-attention call that has just run.

    Parameters
    ----------
    attn, kwargs
        The self-attention module and the arguments of its call (normed hidden states, rotary
        tables, cache).
    rows
        Map of the call. Only the question of every prompt votes, see `Prompt.question_stop`.
    raters : Tensor of float32, shape (B, n), or None
        Weights of the rows that vote under `Attention("raters")`, see `rater_weights`.
    past
        Rows of earlier turns in the cache; None: there are none.

    Returns
    -------
    Tensor, float32, shape (kept visual tokens,)
        Spans of all samples concatenated. If no row votes: (B, n), see `_key_lengths`.
    """
    hidden = kwargs["hidden_states"]
    cached = _cached_layer(compat.get_cache(kwargs), attn.layer_idx)
    keys = None if cached is None else cached.keys
    if is_reference(type(cached)) or (
        keys is not None
        and isinstance(cached, DynamicSlidingWindowLayer)
        and keys.shape[-2] < physical_length(cached)
    ):
        keys = cached = None  # the cache holds other rows than this call: recompute keys
    if past is None or keys is None:
        past = RowMap(0)
    call = attn, attn, hidden, kwargs, signal, rows, cached, past
    return _scores(*call, keys, raters)


@torch.no_grad()
def input_scores(
    layer: Any,
    hidden: Tensor,
    arguments: Mapping[str, Any],
    signal: Attention,
    rows: RowMap,
    cache: Any = None,
    index: int = 0,
    raters: Tensor | None = None,
    past: RowMap | None = None,
) -> Tensor:
    """Scores from decoder layer `index` before it runs: only its input norm, q, k and RoPE are
    computed.

    `arguments` are those of the layer for input `hidden` (B, n, d): `position_embeddings`, and
    `position_ids` if it reads them. Scores as in `layer_scores`.
    """
    cached = _cached_layer(cache, index)
    attn = attention_of(layer)
    if past is None or not physical_length(cached):
        past = RowMap(0)
    with unsharded(layer):
        return _scores(layer, attn, hidden, arguments, signal, rows, cached, past, None, raters)


def _scores(
    root: Any,
    attn: Any,
    hidden: Tensor,
    arguments: Mapping[str, Any],
    signal: Attention,
    rows: RowMap,
    cached: Any,
    past: RowMap,
    keys: Tensor | None,
    raters: Tensor | None,
) -> Tensor:
    """Scores of all spans; `keys` (B, kv heads, past + n, D) are those of the call, if known.

    A voter sees a contiguous range of keys, unless other prompts or padding of an earlier turn are
    in between. If so, samples are scored one by one, otherwise together.
    """
    from tokencomp.kernels.dispatch import checked

    # One group if all voters see contiguous keys, else one group per question.
    questions = questions_of(rows)
    groups = [[q] for q in questions] if rows.packed or past.rows else [questions]
    if signal.rows == "none":
        lengths = hidden.new_zeros(hidden.shape[:2], dtype=torch.float32)
        for group in groups:
            _key_lengths(Probe(root, attn, hidden, arguments, group), lengths)
        return lengths
    parts = []
    with checked():  # indices were built on the host
        for group in groups:
            probe = Probe(root, attn, hidden, arguments, group)
            known = keys is not None and probe.caches_keys(keys)
            parts.append(_span_scores(probe, signal, cached, past, keys if known else None, raters))
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _span_scores(
    probe: Probe,
    signal: Attention,
    cached: Any,
    past: RowMap,
    keys: Tensor | None,
    raters: Tensor | None,
) -> Tensor:
    """Mean attention from the voting rows to every token of every span.

    The text after a span votes on it; without such text, the last row does. Text before a span does
    not see it (causal attention), so one pass over all text adds exactly 0 there and serves all
    spans: O(text · keys) for any number of spans. All ways of joining heads commute with the
    division by the number of voters.
    """
    # Which rows vote on which tokens; indices move to the device in one copy.
    passes, columns, voters = _votes(probe, signal.rows)
    host, every = {"column": columns, "voters": voters}, signal.rows == "all"
    tables = [_voting(probe, votes, every) for votes in passes.values()]
    index = np.concatenate(tables, axis=1)
    last = np.asarray([[q.stop - 1 - probe.first] for q in probe.questions])
    if not every:
        host["voting"] = np.where(index < 0, last, index).ravel()
    moved = move_tables(host, probe.device)
    chosen = None if every else moved["voting"].view(index.shape)
    # Queries of the voting rows; keys of earlier turns come before those of this call.
    if keys is None:
        captured = probe.queries_and_keys(chosen, cached, past)
    else:
        captured = probe.queries(chosen)
        current = probe.columns(keys[..., past.rows :, :] if past.rows else keys)
        captured.key = with_past(cached, past, probe.questions[0].sample, current)
    k, offset = captured.key, captured.key.shape[2] - probe.width
    if signal.iterations > 1 and offset:
        # PageRank needs a query for every key, so it excludes earlier turns.
        k, offset = k[:, :, offset:], 0
    # One pass over the keys for every kind of voters.
    visible = torch.from_numpy(_visible(probe, index, offset)).to(k.device)
    sums, at = [], 0
    for rows, table in zip(passes, tables, strict=True):
        part = slice(at, at + table.shape[1])
        whole = len(tables) == 1
        query = captured.query if whole else captured.query[:, :, part]
        seen = visible if whole else visible[:, :, part]
        weights = None
        if rows == "raters" and raters is not None and chosen is not None:
            weights = (
                probe.of_samples(raters)
                .to(k.device)
                .gather(1, chosen[:, part].to(k.device) + probe.first)
            )
        sums.append(_column_sums(probe, query, k, seen, captured.scaling, signal, weights))
        at = part.stop
    # From sums over all keys of this call to means for visual tokens.
    sums = [s[..., offset:] if offset else s for s in sums]
    flat = (torch.cat(sums) if len(sums) > 1 else sums[0]).flatten()
    return flat.index_select(0, moved["column"]) / moved["voters"]


def _key_lengths(probe: Probe, lengths: Tensor) -> None:
    """Write Σ|k| over all heads of every token of some questions to `lengths` (B, n).

    Keys are taken before rotation: rotated keys would make the sum depend on the position of the
    prompt in its batch.
    """
    keys = probe.unrotated_keys().float().abs().sum(3)
    groups = getattr(probe.attn, "num_key_value_groups", 1)  # queries that share one key
    shared = keys.repeat_interleave(groups, dim=1)
    found = gather_heads(probe.attn, shared, dim=1).sum(1) / groups
    columns = slice(probe.first, probe.first + probe.width)
    for question, row_lengths in zip(probe.questions, found, strict=True):
        lengths[question.sample, columns] = row_lengths


def _votes(
    probe: Probe, signal_rows: str
) -> tuple[dict[str, list[list[int]]], HostIndex, HostIndex]:
    """Which columns vote on which tokens.

    Parameters
    ----------
    signal_rows
        The `rows` of the signal.

    Returns
    -------
    dict
        By pass over the keys, per question: the columns that vote.
    ndarray, shape (visual tokens,)
        Index of every token of every span in the concatenated sums of all passes.
    ndarray, shape (visual tokens,)
        Number of columns that vote on it; 1 if weights are normalised, as those of raters.
    """
    questions = probe.questions
    passes: dict[str, list[list[int]]] = {}
    places, voters = [], []
    for number, question in enumerate(questions):
        text = question.text if signal_rows in ("text", "raters") else []
        if signal_rows == "raters":
            text = [column for column in text if column >= question.spans[-1].stop]
        votes = {
            "text": text,
            "raters": text,
            "last": [question.stop - 1],
            "all": list(range(question.first, question.stop)),
        }
        # Text after a span votes on it; the last row votes where there is no such text.
        for span in question.spans:
            later = len(text) - bisect.bisect_left(text, span.stop)
            silent = signal_rows in ("text", "raters") and not later
            rows = "last" if silent else signal_rows
            passes.setdefault(rows, [[] for _ in questions])[number] = votes[rows]
            order = list(passes).index(rows) * len(questions) + number
            places.append(np.arange(span.start, span.stop) + order * probe.width - probe.first)
            count = {"text": later, "raters": 1}.get(rows, len(votes[rows]))
            voters.append(np.full(span.count, count))
    return passes, np.concatenate(places), np.concatenate(voters)


def _visible(probe: Probe, index: HostIndex, offset: int) -> np.ndarray[Any, np.dtype[np.int32]]:
    """First visible key, end of visible keys, and key of the voting rows, (3, S, R).

    The `offset` keys of earlier turns come first and are all real; shorter samples begin with
    padding after them.
    """
    starts = np.asarray([[q.first - probe.first] for q in probe.questions])
    key = np.where(index < 0, -1, index + offset)
    first = np.broadcast_to(0 if offset else starts, index.shape)
    return np.stack([np.where(index < 0, 0, first), key + 1, key]).astype(np.int32)


def _voting(probe: Probe, votes: list[list[int]], every: bool) -> HostIndex:
    """Columns that vote, (S, R), relative to the first of the probe; -1 where there are fewer.

    `every`: all columns of a question, row i at index i.
    """
    index = np.full((len(votes), probe.width if every else max(map(len, votes))), -1)
    for row, columns in zip(index, votes, strict=True):
        voting = np.asarray(columns, dtype=np.int64) - probe.first
        row[voting if every else slice(len(voting))] = voting
    return index


def _column_sums(
    probe: Probe,
    query: Tensor,
    k: Tensor,
    visible: Tensor,
    scaling: float,
    signal: Attention,
    weights: Tensor | None,
) -> Tensor:
    """Attention to each of N keys, summed over the rows `query` and joined over heads, (S, N).

    Rows have `weights` (S, R), or weight 1.
    """
    from tokencomp.kernels import attention_colsum, join_heads

    sums = attention_colsum(
        query,
        k,
        weights,
        visible=visible,
        scale=scaling,
        temperature=signal.temperature,
        heads="none",
        iterations=max(signal.iterations, 1),
    )
    joined: Tensor = join_heads(gather_heads(probe.attn, sums, dim=1), signal.heads)
    return joined


def _cached_layer(cache: Any, index: int) -> Any:
    layers = getattr(cache, "layers", None)
    return layers[index] if layers and index < len(layers) else None


# -- scores for the stages of a call --------------------------------------------------------------


class StageScores:
    """Scores for the stages of one call that have not run yet, by layer of the stage.

    Parameters
    ----------
    layers
        All decoder layers.

    Attributes
    ----------
    raters : Tensor of float32, shape (B, rows), or None
        See `rater_weights`; None if no stage needs them.
    """

    def __init__(self, layers: nn.ModuleList) -> None:
        self._layers = layers
        self._spans: dict[int, Tensor] = {}
        self._texts: dict[int, list[list[Tensor]]] = {}
        self.raters: Tensor | None = None

    def known(self, stage: int) -> bool:
        return stage in self._spans

    def of_call(
        self,
        stage: int,
        attn: nn.Module,
        kwargs: Mapping[str, Any],
        signal: Attention,
        rows: RowMap,
        past: RowMap,
    ) -> None:
        """Compute scores for a stage from an attention call that has run, see `layer_scores`."""
        self._take(stage, signal, layer_scores(attn, kwargs, signal, rows, self.raters, past), rows)

    def of_input(
        self,
        stage: int,
        x: Tensor,
        arguments: Mapping[str, Any],
        signal: Attention,
        rows: RowMap,
        cache: Any,
        past: RowMap,
    ) -> None:
        """Compute scores for a stage from queries and keys of the layer after it.

        Parameters
        ----------
        x : Tensor, shape (B, n, d)
            Hidden states before the stage.
        arguments
            `position_embeddings` and `position_ids` of the layer.
        past
            Rows of earlier turns in the cache of the layer.
        """
        layer = self._layers[stage]
        scores = input_scores(layer, x, arguments, signal, rows, cache, stage, self.raters, past)
        self._take(stage, signal, scores, rows)

    def _take(self, stage: int, signal: Attention, scores: Tensor, rows: RowMap) -> None:
        """Store scores; those of all rows, (B, n), in two parts."""
        if signal.rows == "none":
            self._texts[stage] = text_values(scores, rows)
            scores = visual_values(scores, rows)
        self._spans[stage] = scores

    def pop(
        self, stage: int, device: torch.device
    ) -> tuple[Tensor | None, list[list[Tensor]] | None]:
        """Remove and return scores of visual tokens and of text for a stage, see `tokens_of`."""
        scores = self._spans.pop(stage, None)
        return None if scores is None else scores.to(device), self._texts.pop(stage, None)

    def follow(self, before: RowMap, after: RowMap, index: Tensor, device: torch.device) -> None:
        """Remove scores of dropped tokens; `index` is that of `RowMap.keep`."""
        if self.raters is not None:
            self.raters = self.raters.to(device).gather(1, index)
        for stage, scores in self._spans.items():
            self._spans[stage] = kept_values(scores.to(device), before, after, index)


@torch.no_grad()
def rater_weights(x: Tensor, rows: RowMap) -> Tensor:
    """Weights of the raters of every prompt among the rows of the embeddings x (B, n, d).

        r_m = mean over visual tokens i of softmax over text tokens m of (x_i · q_m)

    for the text q after the last span (SparseVLM, arXiv 2410.04417). Raters are the tokens whose
    r_m is at least the mean; their weights are equal, and sum to 1 in a prompt.

    Returns
    -------
    Tensor of float32, shape (B, n)
        0 for all other rows.
    """
    weights = x.new_zeros(x.shape[:2], dtype=torch.float32)
    for b, prompts in enumerate(rows.prompts):
        for prompt in prompts:
            spans, text = rows.spans_of(b, prompt), rows.question_text(b, prompt)
            if not spans or text.start == text.stop:
                continue
            visual = torch.cat([x[b, kept.start : kept.stop] for kept in spans]).float()
            rating = (visual @ x[b, text].float().T).softmax(1).mean(0)
            chosen = (rating >= rating.mean() * (1 - 1e-6)).float()
            weights[b, text] = chosen / chosen.sum()
    return weights
