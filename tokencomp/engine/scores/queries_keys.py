"""Queries and keys of the tokens of some questions at a decoder layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokencomp.engine.cache.rows import stored
from tokencomp.engine.rows.arguments import each
from tokencomp.engine.rows.compaction import take
from tokencomp.engine.rows.layout import KeptSpan, RowLayout
from tokencomp.engine.scores.capture import Captured, Past, capture_qk
from tokencomp.torchlib import compat

# Arguments of a layer that a probe leaves out: it knows what is padding.
LEFT_OUT = ("hidden_states", "attention_mask", "cache_position", *compat.CACHE_NAMES)


@dataclass
class QuestionColumns:
    """The columns of a prompt up to the end of its question, and its spans."""

    sample: int
    first: int
    stop: int
    spans: list[KeptSpan]

    @property
    def text(self) -> list[int]:
        """Columns of text after the start of the first span."""
        visual = {c for s in self.spans for c in range(s.start, s.stop)}
        return [c for c in range(self.spans[0].start, self.stop) if c not in visual]


def questions_of(layout: RowLayout) -> list[QuestionColumns]:
    """The questions of all prompts with spans, in order."""
    return [
        QuestionColumns(b, prompt.start, prompt.question_stop, spans)
        for b, prompts in enumerate(layout.prompts)
        for prompt in prompts
        if (spans := layout.spans_of(b, prompt))
    ]


class Probe:
    """The tokens of some questions at a layer, at most one question of every sample.

    Parameters
    ----------
    projected : Tensor, shape (B, n, width), or None
        What `q_proj` has made of `hidden` (B, n, d) in the call that has just run.

    Attributes
    ----------
    first, width
        The columns of the layout that hold all of them.
    """

    def __init__(
        self,
        root: Any,
        attn: Any,
        hidden: Tensor,
        arguments: Mapping[str, Any],
        questions: list[QuestionColumns],
        projected: Tensor | None = None,
    ) -> None:
        self.root, self.attn, self.questions = root, attn, questions
        self.first = min(q.first for q in questions)
        self.width = max(q.stop for q in questions) - self.first
        samples = [q.sample for q in questions]
        # One sample is a view, and all samples need no choice.
        self.samples: slice | Tensor | None = slice(samples[0], samples[0] + 1)
        if samples == list(range(len(hidden))):
            self.samples = None
        elif len(samples) > 1:
            self.samples = torch.tensor(samples, device=hidden.device)
        self._part = None if self.samples is None else (len(hidden), self.samples)
        self._hidden: Tensor = _of_samples(hidden, self, hidden.shape[1], False)
        self._projected: Tensor | None = _of_samples(projected, self, hidden.shape[1], False)
        self._arguments = {
            name: _of_samples(value, self, hidden.shape[1], "embeddings" in name)
            for name, value in arguments.items()
            if name not in LEFT_OUT
        }

    @property
    def device(self) -> torch.device:
        return self._hidden.device

    def of_samples(self, values: Tensor) -> Tensor:
        """The rows of values (B, …) that belong to the samples of these questions."""
        if self.samples is None or isinstance(self.samples, slice):
            return values if self.samples is None else values[self.samples]
        return values[self.samples.to(values.device)]

    def columns(self, keys: Tensor) -> Tensor:
        """The part (S, kv heads, width, D) of keys (B, kv heads, n, D) that belongs to these."""
        keys = keys if self.samples is None else keys[self.samples]
        if keys.shape[2] == self.width:
            return keys
        return keys.narrow(2, self.first, self.width)

    def queries(self, rows: Tensor | None) -> Captured:
        """Queries (S, heads, R, d) of some rows (S, R), or of all; the factor of their product."""
        projected = self._projected if rows is None else None
        return self._capture(rows, ("k_proj", "v_proj"), projected)

    def queries_and_keys(self, rows: Tensor | None, cached: Any, past: int) -> Captured:
        """`queries`, and keys of all tokens; of one sample behind those of earlier turns."""
        from tokencomp.kernels import gather_rows

        sample, earlier = self.questions[0].sample, None
        if past and not self.caches_keys(stored(cached, "keys")):
            both = (_earlier(cached, x, past, sample) for x in (cached.keys, cached.values))
            earlier, past = Past(*both), 0
        caches = {} if earlier is None else dict.fromkeys(compat.CACHE_NAMES, earlier)
        arguments = {**self._arguments, **caches}
        call = self.root, self.attn, self._hidden, arguments, ("v_proj",), rows
        captured = capture_qk(*call, samples=self._part)
        query = captured.query if rows is None else gather_rows([captured.query], rows, 2, 0)[0]
        return Captured(query, with_past(cached, past, sample, captured.key), captured.scaling)

    def unrotated_keys(self) -> Tensor:
        """Keys (S, kv heads, width, D) of all tokens before the rotary embedding."""
        arguments, tables = dict(self._arguments), self._arguments.get("position_embeddings")
        if isinstance(tables, Tensor):  # complex factors
            arguments["position_embeddings"] = torch.ones_like(tables)
        elif tables is not None:
            cos, sin = tables
            arguments["position_embeddings"] = torch.ones_like(cos), torch.zeros_like(sin)
        skipped = ("q_proj", "v_proj")
        call = self.root, self.attn, self._hidden, arguments, skipped
        return capture_qk(*call, samples=self._part).key

    def caches_keys(self, keys: Tensor) -> bool:
        """Whether a cache of these rows holds the keys that attention reads.

        Latent attention may cache what keys are computed from. Its keys have another shape.
        """
        config = compat.layer_config(self.attn.config, self.attn.layer_idx)
        if getattr(config, "kv_lora_rank", None) is None:
            return True
        row = torch.zeros(len(self._hidden), 1, dtype=torch.int64, device=self._hidden.device)
        key = self._capture(row, ("q_proj",)).key
        return (keys.shape[1], keys.shape[-1]) == (key.shape[1], key.shape[-1])

    def _capture(
        self, rows: Tensor | None, skipped: tuple[str, ...], projected: Tensor | None = None
    ) -> Captured:
        hidden, arguments = self._hidden, self._arguments
        if rows is not None:
            hidden = _rows_of(hidden, rows, self.width, False)
            arguments = {
                name: _rows_of(value, rows, self.width, "embeddings" in name)
                for name, value in arguments.items()
            }
        call = self.root, self.attn, hidden, arguments, skipped
        return capture_qk(*call, projected=projected, samples=self._part)


def _of_samples(value: Any, probe: Probe, width: int, tables: bool) -> Any:
    """What belongs to the samples and columns of a probe; a batch axis of 1 is shared by all.

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
        if value.shape[batch] > 1 and probe.samples is not None:
            value = value[(slice(None),) * batch + (probe.samples,)]
        if probe.width == width:
            return value
        return value.narrow(batch + 1, probe.first, probe.width)
    return each(value, lambda item: _of_samples(item, probe, width, tables))


def _rows_of(value: Any, rows: Tensor, width: int, tables: bool) -> Any:
    """Columns `rows` (S, R) of what `_of_samples` returned."""
    if isinstance(value, Tensor):
        axis = value.ndim - 2 if tables else 1
        if value.ndim < 2 or value.shape[axis] != width:
            return value
        return take([value], rows.to(value.device), [axis])[0]
    return each(value, lambda item: _rows_of(item, rows, width, tables))


def _earlier(cached: Any, rows: Tensor, past: int, sample: int) -> Tensor:
    """The first `past` rows of one sample, real ones only, of a cache layer's keys or values."""
    held = min(past, rows.shape[2])  # a sliding window keeps the last rows alone
    old, valid = rows[sample : sample + 1, :, :held], getattr(cached, "valid", None)
    return old if valid is None else old[:, :, valid[sample, past - held : past].to(old.device)]


def with_past(cached: Any, past: int, sample: int, current: Tensor) -> Tensor:
    """Keys of earlier turns (real rows only) of one sample in front of its own `current`."""
    if past == 0:
        return current
    earlier = _earlier(cached, stored(cached, "keys"), past, sample)
    return torch.cat([earlier.to(current.device), current], dim=2)
