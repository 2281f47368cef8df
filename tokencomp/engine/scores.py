"""Attention scores, computed without changing the model's attention backend.

Queries of the voting rows are recomputed from the input of the layer (`tokencomp.engine.capture`);
keys come from the KV cache. `tokencomp.kernels.attention_colsum` sums the columns of the softmax
without a rows × keys tensor. Sliding windows and indexers of the layer are ignored: the scores are
the attention that each token would receive if the whole prompt were visible.
"""

from __future__ import annotations

import bisect
import contextlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from transformers.cache_utils import DynamicSlidingWindowLayer

from tokencomp.engine.cache import is_reference, physical_length, stored
from tokencomp.engine.capture import (
    Captured,
    Past,
    RowIndex,
    attention_of,
    capture_qk,
    gather_heads,
)
from tokencomp.engine.gather import take
from tokencomp.engine.rowmap import (
    KeptSpan,
    RowMap,
    kept_values,
    move_tables,
    text_values,
    visual_values,
)
from tokencomp.tokens.signals import Attention
from tokencomp.tokens.stacks import HostIndex
from tokencomp.torchlib import compat

# Arguments of a layer that a probe does not pass: it handles padding itself.
LEFT_OUT = ("hidden_states", "attention_mask", "cache_position", *compat.CACHE_NAMES)


@dataclass(eq=False)
class StageScores:
    """Scores for the stages of one call that have not run yet, by layer of the stage.

    Attributes
    ----------
    layers
        All decoder layers.
    spans
        Scores of visual tokens, float32 (kept visual tokens,), over the spans of all samples.
    texts
        Lengths of keys of text, for signals that have them instead of votes.
    raters : Tensor of float32, shape (B, rows), or None
        See `rater_weights`; None if no stage needs them.
    seconds
        Host time of `of_call`.
    """

    layers: nn.ModuleList
    spans: dict[int, Tensor] = field(default_factory=dict)
    texts: dict[int, list[list[Tensor]]] = field(default_factory=dict)
    raters: Tensor | None = None
    seconds: float = 0.0

    @torch.no_grad()  # scores select rows, and carry no gradient
    def of_call(
        self,
        stage: int,
        attn: Any,
        kwargs: Mapping[str, Any],
        signal: Attention,
        rows: RowMap,
        past: RowMap,
    ) -> None:
        """Compute scores for a stage from a self-attention call that has just run.

        Parameters
        ----------
        attn, kwargs
            The self-attention module and the arguments of its call (normed hidden states, rotary
            tables, cache).
        rows
            Map of the call. Only the question of every prompt votes, see `Prompt.question_stop`.
        past
            Rows of earlier turns in the cache of the layer.
        """
        started = time.perf_counter()
        cached = _cached_layer(compat.get_cache(kwargs), attn.layer_idx)
        keys = None if cached is None else cached.keys
        if is_reference(type(cached)) or (
            keys is not None
            and isinstance(cached, DynamicSlidingWindowLayer)
            and keys.shape[-2] < physical_length(cached)
        ):
            keys = cached = None  # the cache holds other rows than this call: recompute keys
        if keys is None:
            past = RowMap(0)
        hidden = kwargs["hidden_states"]
        self._score(stage, attn, hidden, kwargs, signal, rows, cached, past, keys)
        self.seconds += time.perf_counter() - started

    @torch.no_grad()
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
        """Compute scores for a stage from the layer after it, before that runs: only its input
        norm, q, k and RoPE are computed.

        Parameters
        ----------
        x : Tensor, shape (B, n, d)
            Hidden states before the stage.
        arguments
            `position_embeddings` of the layer, and `position_ids` if it reads them.
        rows, past
            As in `of_call`.
        """
        layer, cached = self.layers[stage], _cached_layer(cache, stage)
        if past.rows and not physical_length(cached):
            past = RowMap(0)
        with unsharded(layer):
            self._score(stage, layer, x, arguments, signal, rows, cached, past, None)

    def _score(
        self,
        stage: int,
        root: Any,
        hidden: Tensor,
        arguments: Mapping[str, Any],
        signal: Attention,
        rows: RowMap,
        cached: Any,
        past: RowMap,
        keys: Tensor | None,
    ) -> None:
        """Store scores; `root` is an attention module, or the decoder layer around it.

        `keys` (B, kv heads, past + n, D) are those of the call, if known.

        A voter sees a contiguous range of keys, unless other prompts or padding of an earlier turn
        are in between. If so, samples are scored one by one, otherwise together.
        """
        questions = [
            Question(b, prompt.start, prompt.question_stop, spans)
            for b, prompts in enumerate(rows.prompts)
            for prompt in prompts
            if (spans := rows.spans_of(b, prompt))
        ]
        groups = [[q] for q in questions] if rows.packed or past.rows else [questions]
        probes = [Probe(root, hidden, arguments, group) for group in groups]
        if signal.rows != "none":
            parts = [_span_scores(p, signal, cached, past, keys, self.raters) for p in probes]
            self.spans[stage] = torch.cat(parts) if len(parts) > 1 else parts[0]
            return
        lengths = hidden.new_zeros(hidden.shape[:2], dtype=torch.float32)
        for probe in probes:
            _key_lengths(probe, lengths)
        self.texts[stage] = text_values(lengths, rows)
        self.spans[stage] = visual_values(lengths, rows)

    def follow(self, before: RowMap, after: RowMap, index: Tensor, device: torch.device) -> None:
        """Remove scores of dropped tokens; `index` is that of `RowMap.keep`."""
        if self.raters is not None:
            self.raters = self.raters.to(device).gather(1, index)
        for stage, scores in self.spans.items():
            self.spans[stage] = kept_values(scores.to(device), before, after, index)


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


def _cached_layer(cache: Any, index: int) -> Any:
    layers = getattr(cache, "layers", None)
    return layers[index] if layers and index < len(layers) else None


@contextlib.contextmanager
def unsharded(layer: nn.Module) -> Iterator[None]:
    """Gather the weights of `layer` under FSDP, so that its submodules can be called one by one.

    FSDP gathers weights when the layer itself is called. Under FSDP2 they then stay gathered for
    that call; FSDP1 frees them, and gathers them once more.
    """
    for module in layer.modules():
        unshard = getattr(module, "unshard", None)
        if unshard is not None:
            unshard()
    if any(hasattr(module, "_fsdp_wrapped_module") for module in layer.modules()):
        from torch.distributed.fsdp import FullyShardedDataParallel

        with FullyShardedDataParallel.summon_full_params(layer, writeback=False):
            yield
    else:
        yield


# -- queries and keys of questions at a layer -----------------------------------------------------


@dataclass
class Question:
    """Rows `first … stop - 1` of a prompt, from its start to the end of its question, and its
    spans.
    """

    sample: int
    first: int
    stop: int
    spans: list[KeptSpan]

    @property
    def text(self) -> list[int]:
        """Rows of text after the start of the first span."""
        visual = {c for s in self.spans for c in range(s.start, s.start + s.count)}
        return [c for c in range(self.spans[0].start, self.stop) if c not in visual]


class Probe:
    """Queries and keys of the questions of a batch at one layer, at most one question per sample.

    Parameters
    ----------
    root
        An attention module, or the decoder layer around it.
    hidden : Tensor, shape (B, n, d)
        Input of `root`.

    Attributes
    ----------
    first, width
        First row of any of the questions, and number of rows up to the end of the last one.
    samples
        The samples of these questions; None: all.
    """

    def __init__(
        self,
        root: Any,
        hidden: Tensor,
        arguments: Mapping[str, Any],
        questions: list[Question],
    ) -> None:
        self.root, self.questions = root, questions
        self.first = min(q.first for q in questions)
        self.width = max(q.stop for q in questions) - self.first
        samples = [q.sample for q in questions]
        # One sample is a view; all samples need no selection.
        self.samples: slice | Tensor | None = slice(samples[0], samples[0] + 1)
        if samples == list(range(len(hidden))):
            self.samples = None
        elif len(samples) > 1:
            self.samples = torch.tensor(samples, device=hidden.device)
        self._part = None if self.samples is None else (len(hidden), self.samples)
        self.hidden, n = self._cut(hidden.shape[1], False, hidden), hidden.shape[1]
        self._arguments = {
            name: tree_map_only(Tensor, partial(self._cut, n, "embeddings" in name), value)
            for name, value in arguments.items()
            if name not in LEFT_OUT
        }

    def _cut(self, n: int, tables: bool, value: Tensor) -> Tensor:
        """Samples and rows of these questions of a tensor (B, n, …), or (1, n, …) for all samples.

        Rotary `tables` are (B, n, d) or (3, B, n, d). Tensors of other shapes are unchanged.
        """
        batch = value.ndim - 3 if tables else 0
        if value.ndim < 2 or value.shape[batch + 1] != n:
            return value
        if value.shape[batch] > 1 and self.samples is not None:
            value = value[(slice(None),) * batch + (self.samples,)]
        return value if self.width == n else value.narrow(batch + 1, self.first, self.width)

    def queries_and_keys(
        self, rows: RowIndex | None, cached: Any, past: RowMap, keys: Tensor | None
    ) -> Captured:
        """Queries (S, heads, R, d) of some rows, or of all; and the keys of all rows, of a
        single sample after those of earlier turns.

        `keys` (B, kv heads, past + n, D) are those of the call, if known.
        """
        sample, earlier = self.questions[0].sample, {}
        if keys is not None and self._caches_keys(keys):
            captured = self._capture(None if rows is None else rows[1], ("k_proj", "v_proj"))
            current = keys[:, :, past.rows :] if past.rows else keys
            current = current if self.samples is None else current[self.samples]
            whole = current.shape[2] == self.width
            captured.key = current if whole else current.narrow(2, self.first, self.width)
        else:
            if past.rows and not self._caches_keys(stored(cached, "keys")):
                both = Past(*(_earlier(x, past, sample) for x in (cached.keys, cached.values)))
                earlier, past = dict.fromkeys(compat.CACHE_NAMES, both), RowMap(0)
            arguments = {**self._arguments, **earlier}
            call = self.root, self.hidden, arguments, ("v_proj",), rows
            captured = capture_qk(*call, samples=self._part)
        if past.rows:
            before = _earlier(stored(cached, "keys"), past, sample)
            captured.key = torch.cat([before.to(captured.key.device), captured.key], dim=2)
        return captured

    def unrotated_keys(self) -> Captured:
        """Keys (S, kv heads, width, D) before the rotary embedding."""
        arguments, tables = dict(self._arguments), self._arguments.get("position_embeddings")
        if isinstance(tables, Tensor):  # complex factors
            arguments["position_embeddings"] = torch.ones_like(tables)
        elif tables is not None:
            cos, sin = tables
            arguments["position_embeddings"] = torch.ones_like(cos), torch.zeros_like(sin)
        call = self.root, self.hidden, arguments, ("q_proj", "v_proj")
        return capture_qk(*call, samples=self._part)

    def _caches_keys(self, keys: Tensor) -> bool:
        """Whether the cache holds the keys that attention reads.

        Latent attention may cache latents instead, which have another shape.
        """
        attn = attention_of(self.root)
        config = compat.layer_config(attn.config, attn.layer_idx)
        if getattr(config, "kv_lora_rank", None) is None:
            return True
        row = torch.zeros(len(self.hidden), 1, dtype=torch.int64, device=self.hidden.device)
        key = self._capture(row, ("q_proj",)).key
        return (keys.shape[1], keys.shape[-1]) == (key.shape[1], key.shape[-1])

    def _capture(self, rows: Tensor | None, skipped: tuple[str, ...]) -> Captured:
        """Run the module on `rows` (S, R) only; None: on all rows."""
        hidden, arguments = self.hidden, self._arguments
        if rows is not None:
            hidden = self._take(rows, False, hidden)
            arguments = {
                name: tree_map_only(Tensor, partial(self._take, rows, "embeddings" in name), value)
                for name, value in arguments.items()
            }
        return capture_qk(self.root, hidden, arguments, skipped, samples=self._part)

    def _take(self, rows: Tensor, tables: bool, value: Tensor) -> Tensor:
        """Select `rows` (S, R) of a result of `_cut`."""
        axis = value.ndim - 2 if tables else 1
        if value.ndim < 2 or value.shape[axis] != self.width:
            return value
        return take([value], rows.to(value.device), [axis])[0]


def _earlier(rows: Tensor, past: RowMap, sample: int) -> Tensor:
    """Real rows of earlier turns of one sample, of a cache layer's keys or values."""
    held = min(past.rows, rows.shape[2])  # a sliding layer holds only the last rows
    old, real = rows[sample : sample + 1, :, :held], past.mask(rows.device)
    return old if real is None else old[:, :, real[sample, past.rows - held :]]


# -- votes of rows on tokens ----------------------------------------------------------------------


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
    index, parts, host = _vote_tables(probe, signal.rows)
    moved, chosen = move_tables(host, probe.hidden.device), None
    if "voting" in moved:
        chosen = moved["sample"][:, None], moved["voting"].view(index.shape)
    # Queries of the voting rows; keys of earlier turns come before those of this call.
    captured = probe.queries_and_keys(chosen, cached, past, keys)
    k, offset = captured.key, captured.key.shape[2] - probe.width
    if signal.iterations > 1 and offset:
        # PageRank needs a query for every key, so it excludes earlier turns.
        k, offset = k[:, :, offset:], 0
    # One pass over the keys for every kind of voters; then sums over the keys of this call.
    visible = torch.from_numpy(_visible(probe, index, offset)).to(k.device)
    sums, whole = [], len(parts) == 1
    for rows, part in parts.items():
        weights = None
        if rows == "raters" and raters is not None and chosen is not None:
            samples, voting = chosen
            some = raters.to(voting.device)[slice(None) if probe.samples is None else probe.samples]
            weights = some[samples, voting[:, part] + probe.first].to(k.device)
        query = captured.query if whole else captured.query[:, :, part]
        seen = visible if whole else visible[:, :, part]
        part_sums = _column_sums(captured, query, k, seen, signal, weights)
        sums.append(part_sums[..., offset:] if offset else part_sums)
    # From sums over rows to means, for visual tokens.
    found = sums[0] if whole else torch.cat(sums)
    return found[moved["line"], moved["column"]] / moved["voters"]


def _key_lengths(probe: Probe, lengths: Tensor) -> None:
    """Write Σ|k| over all heads of every token of some questions to `lengths` (B, n).

    Keys are taken before rotation: rotated keys would make the sum depend on the position of the
    prompt in its batch.
    """
    captured = probe.unrotated_keys()
    groups = getattr(captured.attn, "num_key_value_groups", 1)  # queries that share one key
    shared = captured.key.float().abs().sum(3).repeat_interleave(groups, dim=1)
    found = gather_heads(captured.attn, shared, dim=1).sum(1) / groups
    columns = slice(probe.first, probe.first + probe.width)
    for question, row_lengths in zip(probe.questions, found, strict=True):
        lengths[question.sample, columns] = row_lengths


def _vote_tables(
    probe: Probe, signal_rows: str
) -> tuple[HostIndex, dict[str, slice], dict[str, HostIndex]]:
    """Which rows vote, by `_votes`, as tables on the host.

    Returns
    -------
    ndarray, shape (S, R)
        Rows that vote, relative to the first of the probe, in one pass over the keys after the
        other; -1 where a question has fewer. If all rows vote, row i is at index i.
    dict of slice
        By pass: its part of R.
    dict of ndarray
        What the device needs. By visual token: "line" and "column" of its sum in those of all
        passes, and its number of "voters". Unless all rows vote: "sample" (S,) and "voting"
        (S · R,), in which the last row of a question replaces -1.
    """
    passes, places, voters = _votes(probe, signal_rows)
    line, column = np.divmod(places, probe.width)
    host, every = {"line": line, "column": column, "voters": voters}, signal_rows == "all"
    tables, parts, at = [], {}, 0
    for rows, votes in passes.items():
        width = probe.width if every else max(map(len, votes))
        table = np.full((len(votes), width), -1)
        for row, voting in zip(table, votes, strict=True):
            found = np.asarray(voting, dtype=np.int64) - probe.first
            row[found if every else slice(len(found))] = found
        tables.append(table)
        parts[rows], at = slice(at, at + width), at + width
    index = np.concatenate(tables, axis=1)
    if not every:
        last = np.asarray([[q.stop - 1 - probe.first] for q in probe.questions])
        host["voting"] = np.where(index < 0, last, index).ravel()
        host["sample"] = np.arange(len(index))
    return index, parts, host


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
            text = [column for column in text if column >= question.spans[-1].start]
        votes = {
            "text": text,
            "raters": text,
            "last": [question.stop - 1],
            "all": list(range(question.first, question.stop)),
        }
        # Text after a span votes on it; the last row votes where there is no such text.
        for span in question.spans:
            later = len(text) - bisect.bisect_left(text, span.start)
            silent = signal_rows in ("text", "raters") and not later
            rows = "last" if silent else signal_rows
            passes.setdefault(rows, [[] for _ in questions])[number] = votes[rows]
            order = list(passes).index(rows) * len(questions) + number
            at = span.start + order * probe.width - probe.first
            places.append(np.arange(at, at + span.count))
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


def _column_sums(
    captured: Captured,
    query: Tensor,
    k: Tensor,
    visible: Tensor,
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
        scale=captured.scaling,
        temperature=signal.temperature,
        heads="none",
        iterations=max(signal.iterations, 1),
        trusted=True,  # indices were built on the host
    )
    whole = gather_heads(captured.attn, sums, dim=1)
    joined: Tensor = join_heads(whole, signal.heads)
    return joined
