"""Attention scores, computed without changing the model's attention backend.

Queries of the voting rows are recomputed from the input of the layer (`tokencomp.engine.capture`);
keys come from the KV cache. `tokencomp.kernels.attention_colsum` sums the columns of the softmax
without a rows × keys tensor. Sliding windows and indexers of the layer are ignored: the scores are
the attention that each token would receive if the whole prompt were visible.

    rows that vote ─► queries and keys ─► keys that a row sees ─► sums over rows ─► means
    `_votes`          `_captured`         `_visible`              `_column_sums`
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicSlidingWindowLayer

from tokencomp.engine.cache import first_layer, is_reference, physical_length, stored
from tokencomp.engine.capture import Captured, Past, RowIndex, capture_qk, gather_heads
from tokencomp.engine.rowmap import (
    RowMap,
    joined_mask,
    joined_weights,
    kept_values,
    move_tables,
    text_values,
    visual_values,
)
from tokencomp.engine.weights import appended, bias_dims
from tokencomp.tokens.signals import Attention
from tokencomp.tokens.stacks import HostIndex
from tokencomp.torchlib import compat

# Arguments of a module that it does not get here: padding is handled by `_visible`.
LEFT_OUT = ("hidden_states", "attention_mask", "cache_position", *compat.CACHE_NAMES)


@dataclass(eq=False)
class StageScores:
    """Scores for the stages of one call that have not run yet, by layer of the stage."""

    layers: nn.ModuleList  # of the decoder
    spans: dict[int, Tensor] = field(default_factory=dict)  # float32 (kept visual tokens,)
    # Lengths of keys, for signals without votes.
    texts: dict[int, list[list[Tensor]]] = field(default_factory=dict)
    raters: Tensor | None = None  # see `rater_weights`, (B, rows)
    seconds: float = 0.0  # host time of scores by layers that have run

    @torch.no_grad()  # scores select rows, and carry no gradient
    def add(
        self,
        stage: int,
        x: Tensor,
        arguments: Mapping[str, Any],
        signal: Attention,
        row_map: RowMap,
        cache: Any,
        past: RowMap,
        ran: Any = None,
    ) -> None:
        """Compute scores for a stage from the input x (B, n, d) of the module that scores.

        That module is `ran`, an attention module that has just run, so that the cache has its keys.
        If None, it is the decoder layer after the stage, before it runs: only its input norm, q, k
        and RoPE are computed. `arguments` are the others of the module: rotary tables, and
        positions if it reads them. Only the question of every prompt of the call's `row_map` votes,
        see `Prompt.question_stop`. `past`: rows of earlier turns in the cache layer of the module.
        """
        root: Any = self.layers[stage] if ran is None else ran
        cached, keys = first_layer(cache, stage if ran is None else ran.layer_idx), None
        if ran is not None:
            keys = _keys_of_all_rows(cached)
        else:  # FSDP2 gathers weights when the layer is called. They then stay for that call.
            for module in root.modules():
                if hasattr(module, "unshard"):
                    module.unshard()
        if signal.iterations > 1 or (ran is not None and keys is None):
            past = RowMap(0)  # PageRank needs a query for every key
        arguments = {name: a for name, a in arguments.items() if name not in LEFT_OUT}
        # Lengths of keys in place of votes (DART).
        if signal.rows == "none":
            lengths = _key_lengths(root, x, arguments)
            self.texts[stage] = text_values(lengths, row_map)
            self.spans[stage] = visual_values(lengths, row_map)
            return
        # Which rows vote on which tokens; indices move to the device in one copy.
        votes = _votes(row_map, signal.rows)
        moved, voting = move_tables(votes.tables, x.device), None
        if "voting" in moved:
            voting = moved["voting"].view(votes.index.shape), moved["numbers"].view(len(x), -1)
        captured = _captured(root, x, arguments, voting, cached, past, keys)
        if past.weights is not None:
            _weigh_past(captured, row_map, past, signal.temperature)
        raters = self.raters if signal.rows == "raters" else None
        if raters is not None and voting is not None:
            raters = raters.to(x.device).gather(1, voting[0])
        sums = _column_sums(captured, signal, votes, row_map, past, raters)
        # From sums over rows to means, for visual tokens.
        self.spans[stage] = sums[moved["line"], moved["column"]] / moved["voters"]

    def follow(self, before: RowMap, after: RowMap, index: Tensor, device: torch.device) -> None:
        """Remove scores of dropped tokens; for `index` see `RowMap.keep`."""
        if self.raters is not None:
            self.raters = self.raters.to(device).gather(1, index)
        for stage, scores in self.spans.items():
            self.spans[stage] = kept_values(scores.to(device), before, after, index)


@torch.no_grad()
def rater_weights(x: Tensor, row_map: RowMap) -> Tensor:
    """Weights of the raters of every prompt among the rows of the embeddings x (B, n, d).

        r_m = mean over visual tokens i of softmax over text tokens m of (x_i · q_m)

    for the text q after the last span (SparseVLM, arXiv 2410.04417). Raters are the tokens whose
    r_m is at least the mean; their weights are equal, and sum to 1 in a prompt. Returns float32 (B,
    n), 0 for all other rows.
    """
    weights = x.new_zeros(x.shape[:2], dtype=torch.float32)
    for b, prompts in enumerate(row_map.prompts):
        for prompt in prompts:
            spans, text = row_map.spans_of(b, prompt), row_map.question_text(b, prompt)
            if not spans or text.start == text.stop:
                continue
            visual = torch.cat([x[b, kept.start : kept.stop] for kept in spans]).float()
            rating = (visual @ x[b, text].float().T).softmax(1).mean(0)
            chosen = (rating >= rating.mean() * (1 - 1e-6)).float()
            weights[b, text] = chosen / chosen.sum()
    return weights


# -- queries and keys ----------------------------------------------------------------------------


def _keys_of_all_rows(cached: Any) -> Tensor | None:
    """Keys of a cache layer that holds every row written to it; else None."""
    keys: Tensor | None = getattr(cached, "keys", None)
    if keys is None or is_reference(type(cached)):
        return None
    slides = isinstance(cached, DynamicSlidingWindowLayer)
    return None if slides and keys.shape[-2] < physical_length(cached) else keys


def _captured(
    root: Any,
    x: Tensor,
    arguments: dict[str, Any],
    voting: RowIndex | None,
    cached: Any,
    past: RowMap,
    keys: Tensor | None,
) -> Captured:
    """Queries (B, heads, R, d) of the `voting` rows, or of all; and keys (B, kv heads, past + n, D)
    of all rows, those of earlier turns first.

    `keys` are those of earlier calls and of this one, if the cache has them already.
    """
    config = keys is not None and compat.layer_config(root.config, root.layer_idx)
    # Latent attention (DeepSeek) may cache latents instead of keys.
    if keys is not None and getattr(config, "kv_lora_rank", None) is None:
        captured = capture_qk(root, x, arguments, ("k_proj", "v_proj"), voting)
        total = past.rows + x.shape[1]
        captured.key = keys if keys.shape[2] == total else keys[:, :, -total:]
        return captured
    captured = capture_qk(root, x, arguments, ("v_proj",), voting)
    if not past.rows:
        return captured
    before = stored(cached, "keys")[:, :, : past.rows]  # a sliding layer holds the last of them
    if (before.shape[1], before.shape[3]) == (captured.key.shape[1], captured.key.shape[3]):
        captured.key = torch.cat([before.to(captured.key.device), captured.key], dim=2)
        return captured
    latents = Past(before, cached.values[:, :, : past.rows])
    arguments = {**arguments, **dict.fromkeys(compat.CACHE_NAMES, latents)}
    return capture_qk(root, x, arguments, ("v_proj",), voting)


def _weigh_past(captured: Captured, row_map: RowMap, past: RowMap, temperature: float) -> None:
    """Let merged rows of earlier turns count as the tokens that they represent, in place.

    Their logits gain log(weight), as in attention, by a few more dimensions of queries and keys.
    Rows of this call count once: later stages rank what is left of an image by single rows.
    """
    query, key = captured.query, captured.key
    weights = joined_weights(past, RowMap(row_map.rows), key.shape[0], key.device)
    assert weights is not None
    weights = weights[:, -key.shape[2] :]  # a sliding layer holds only the last rows
    more = bias_dims(query, key, weights, captured.scaling / temperature)
    captured.query, captured.key = appended(query, more.of_queries), appended(key, more.of_keys)


def _key_lengths(root: Any, x: Tensor, arguments: dict[str, Any]) -> Tensor:
    """Σ|k| over all heads of every row of x, (B, n).

    Keys are taken before rotation: rotated keys would make the sum depend on the position of the
    prompt in its batch.
    """
    tables = arguments.get("position_embeddings")
    if isinstance(tables, Tensor):  # complex factors
        arguments["position_embeddings"] = torch.ones_like(tables)
    elif tables is not None:
        cos, sin = tables
        arguments["position_embeddings"] = torch.ones_like(cos), torch.zeros_like(sin)
    captured = capture_qk(root, x, arguments, ("q_proj", "v_proj"))
    groups = getattr(captured.attn, "num_key_value_groups", 1)  # queries that share one key
    shared = captured.key.float().abs().sum(3).repeat_interleave(groups, dim=1)
    return gather_heads(captured.attn, shared, dim=1).sum(1) / groups


# -- votes of rows on tokens ----------------------------------------------------------------------


@dataclass(frozen=True)
class Votes:
    """Which rows vote on which tokens, on the host."""

    # Rows that vote, (B, R), in one pass over the keys after the other; -1 where a sample has
    # fewer. If all rows vote, row i is at index i.
    index: HostIndex
    starts: HostIndex  # first row that each of them sees, (B, R): the start of its prompt
    parts: dict[str, slice]  # by pass: its part of R
    # What the device needs. By visual token: "line" and "column" of its sum in those of all passes,
    # and its number of "voters" (1 if weights are normalised, as those of raters). Unless all rows
    # vote: "voting" (B · R,), in which the last row replaces -1; and "numbers" (B · n,), the place
    # of every row in `index`, or -1.
    tables: dict[str, HostIndex]


def _votes(row_map: RowMap, signal_rows: str) -> Votes:
    """The votes for a signal whose `rows` are given.

    The text after a span votes on it; without such text, the last row does. Text before a span does
    not see it (causal attention), so one pass over all text adds exactly 0 there and serves all
    spans: O(text · keys) for any number of spans. All ways of joining heads commute with the
    division by the number of voters.
    """
    passes: dict[str, list[list[int]]] = {}
    places, voters, batch = [], [], len(row_map.prompts)
    starts = np.zeros((batch, row_map.rows), dtype=np.int64)
    for b, prompts in enumerate(row_map.prompts):
        for prompt in prompts:
            starts[b, prompt.start : prompt.stop] = prompt.start
            spans, stop = row_map.spans_of(b, prompt), prompt.question_stop
            if not spans:
                continue
            # Worked example, t text and v visual:
            #     row     0  1  2  3  4  5  6
            #             t  v  v  t  v  t  t      text that votes: 3 5 6
            # All three rows vote on span 1-2. On span 4 rows 5 and 6 vote (`later` is 2): row 3
            # does not see
            # it, and its column sum there gains 0.
            ends = [*(span.start for span in spans[1:]), stop]
            text = [r for span, end in zip(spans, ends, strict=True) for r in range(span.stop, end)]
            if signal_rows == "raters":
                text = [row for row in text if row >= spans[-1].start]
            votes = {"last": [stop - 1], "all": list(range(prompt.start, stop))}
            seen = set[str]()
            for span in spans:
                later = len(text) - bisect.bisect_left(text, span.start)
                # No text after the span (the question came first): the last row of the prompt
                # votes.
                silent = signal_rows in ("text", "raters") and not later
                name = "last" if silent else signal_rows
                voting = votes.get(name, text)
                lines = passes.setdefault(name, [[] for _ in row_map.prompts])
                lines[b] += voting if name not in seen else []
                seen.add(name)
                # Sums are (passes · B, rows): the line of this pass and sample.
                line = list(passes).index(name) * batch + b
                places.append(np.arange(span.start, span.stop) + line * row_map.rows)
                count = {"text": later, "raters": 1}.get(name, len(voting))
                voters.append(np.full(span.count, count))
    of_line, column = np.divmod(np.concatenate(places), row_map.rows)
    tables = {"line": of_line, "column": column, "voters": np.concatenate(voters)}
    return _with_index(passes, starts, tables, every=signal_rows == "all")


def _with_index(
    passes: dict[str, list[list[int]]],
    starts: HostIndex,
    tables: dict[str, HostIndex],
    every: bool,
) -> Votes:
    """Votes from the voting rows of every sample, by pass, and the start of the prompt of every
    row, (B, n); `every`: whether all rows vote.
    """
    indices, parts, at, (batch, width) = [], {}, 0, starts.shape
    for name, votes in passes.items():
        index = np.full((batch, width if every else max(map(len, votes))), -1)
        for row, voting in zip(index, votes, strict=True):
            row[voting if every else slice(len(voting))] = voting
        indices.append(index)
        parts[name], at = slice(at, at + index.shape[1]), at + index.shape[1]
    index = np.concatenate(indices, axis=1)
    # Row -1 is the last row, which is never padding.
    voting = index % width
    if not every:
        numbers = np.full(starts.shape, -1)
        lines, places = (index >= 0).nonzero()
        numbers[lines, index[lines, places]] = places
        tables = {**tables, "voting": voting.ravel(), "numbers": numbers.ravel()}
    return Votes(index, np.take_along_axis(starts, voting, axis=1), parts, tables)


def _visible(votes: Votes, keys: Tensor, row_map: RowMap, past: RowMap) -> tuple[Tensor, Tensor]:
    """Keys (B, kv heads, N, D), aligned to the right where earlier turns have padding; and what the
    voting rows see: first key, end of keys, and their key, int32 (3, B, R).
    """
    from tokencomp.kernels import gather_rows

    first: Any = votes.starts
    if past.rows:
        # Real keys of all turns follow one another, after the padding of all turns.
        mask, first = joined_mask(past, row_map.mask(keys.device), row_map.rows, keys.device), 0
        if mask is not None:
            real = mask[:, -keys.shape[2] :]  # a sliding layer holds only the last rows
            order = real.to(torch.uint8).sort(dim=1, stable=True).indices
            (keys,) = gather_rows([keys], order, 2, 0, trusted=True)
            first = (~real).sum(1, keepdim=True).cpu().numpy()
    unused = votes.index < 0
    key = np.where(unused, -1, votes.index + keys.shape[2] - row_map.rows)
    visible = np.stack([np.where(unused, 0, first), key + 1, key]).astype(np.int32)
    return keys, torch.from_numpy(visible).to(keys.device)


def _column_sums(
    captured: Captured,
    signal: Attention,
    votes: Votes,
    row_map: RowMap,
    past: RowMap,
    raters: Tensor | None,
) -> Tensor:
    """Attention to every row, summed over the voting rows and joined over heads, (passes · B, n).

    `raters` (B, R) are weights of the voting rows in the pass of raters.
    """
    from tokencomp.kernels import attention_colsum, join_heads

    keys, visible = _visible(votes, captured.key, row_map, past)
    found, whole = [], len(votes.parts) == 1
    for name, part in votes.parts.items():
        weights = None
        if name == "raters" and raters is not None:
            weights = raters[:, part].to(keys.device)
        sums = attention_colsum(
            captured.query if whole else captured.query[:, :, part],
            keys,
            weights,
            visible=visible if whole else visible[:, :, part],
            scale=captured.scaling,
            temperature=signal.temperature,
            heads="none",
            iterations=max(signal.iterations, 1),
            trusted=True,  # indices were built on the host
        )
        joined = join_heads(gather_heads(captured.attn, sums, dim=1), signal.heads)
        # Keys of earlier turns take part in the softmax, but are not ranked.
        found.append(joined[:, -row_map.rows :] if past.rows else joined)
    return found[0] if whole else torch.cat(found)
