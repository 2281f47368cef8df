"""Capture queries and keys of any attention module, as it passes them to its attention backend.

A shallow copy of the module, whose config names a backend of ours, runs up to the call of that
backend. Projections, norms, rotary embedding, scales and gates are thus those of the module,
whatever its family, and neither the module nor its config changes.

    module ─ shallow copy ─ q_proj, k_proj ─ norms ─ RoPE ─ backend(query, key, …)
                                                            │ `_capture` raises `Captured`
    caller ◄────────────────────────────────────────────────────┘ with query, key and scaling

The exception ends the call before attention is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tokencomp.adapters.structure import parameters_of
from tokencomp.engine.cache import stored
from tokencomp.engine.gather import each, take
from tokencomp.engine.rowmap import KeptSpan, RowMap
from tokencomp.errors import UnsupportedModelError
from tokencomp.torchlib import compat
from tokencomp.torchlib.parallel import tensor_parallel_group, unwrapped
from tokencomp.torchlib.views import AttributeView, shallow_copy

NAME = "tokencomp_capture"
FIX = "Use a reducer without attention, such as 'divprune'."
CHOICE = "prev_topk_indices"  # selection of the indexer of an earlier layer (GLM, Mistral)
SHARED = "shared_kv_states"  # keys and values that later layers reuse (Gemma 4)
# Arguments of a backend that change the logits beyond scale and RoPE.
OTHER_LOGITS = ("softcap", "s_aux", "sinks", "position_bias")


@dataclass
class Captured(Exception):
    """Queries (S, heads, n, d), keys (S, kv heads, N, d), and the factor of their product."""

    query: Tensor
    key: Tensor
    scaling: float


def _capture(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    **kwargs: Any,
) -> Any:
    """Attention backend that ends the call with its arguments."""
    other = [name for name in OTHER_LOGITS if kwargs.get(name) is not None]
    if other:
        raise UnsupportedModelError(
            f"{type(module).__name__} changes attention logits by {', '.join(other)}, which "
            f"scores do not include. {FIX}"
        )
    raise Captured(query, key, query.shape[-1] ** -0.5 if scaling is None else float(scaling))


def _zeros(width: int, x: Tensor) -> Tensor:
    """Replaces a projection whose values are not needed, only its shape."""
    return x.new_zeros(*x.shape[:-1], width)


def _some_rows(projection: Callable[[Tensor], Tensor], rows: Tensor, x: Tensor) -> Tensor:
    """Apply a projection to `rows` (S, R) of its input only; other rows of the output are zero."""
    out = projection(take([x], rows, [1])[0])
    index = rows[..., None].expand_as(out)
    return out.new_zeros(*x.shape[:2], out.shape[-1]).scatter_(1, index, out)


def _whole_batch(projection: nn.Module, batch: int, samples: slice | Tensor, x: Tensor) -> Tensor:
    """Apply a projection to `samples` of a batch, called with zeros for the other samples."""
    whole = x.new_zeros(batch, *x.shape[1:])
    whole[samples] = x
    out: Tensor = projection(whole)[samples]
    return out


def _takes_more(module: nn.Module) -> bool:
    """Whether hooks pass additional arguments to a module, as PEFT does with adapter names."""
    return any(m._forward_pre_hooks_with_kwargs for m in module.modules())


def _constant(result: Any, *args: Any, **kwargs: Any) -> Any:
    """Replaces an indexer: selects nothing."""
    return result


class Past:
    """A cache with the rows of one sample in one layer; updates are not stored."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values

    def get_seq_length(self, *args: Any) -> int:
        return self.keys.shape[-2]

    def update(self, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Stored rows followed by the new ones."""
        return torch.cat([self.keys, key], dim=-2), torch.cat([self.values, value], dim=-2)


def attention_of(layer: nn.Module) -> Any:
    """The attention module of a decoder layer.

    Raises
    ------
    UnsupportedModelError
        There is none (recurrent layers), or its logits have a bias.
    """
    for name, child in unwrapped(layer).named_children():
        named = any(part in name for part in ("attn", "attention", "mixer"))
        if named and hasattr(unwrapped(child), "scaling"):
            if hasattr(unwrapped(child), "rel_extent"):
                raise UnsupportedModelError(
                    f"{type(unwrapped(child)).__name__} adds a bias by distance to its attention "
                    f"logits, which scores do not include. {FIX}"
                )
            return unwrapped(child)
    raise UnsupportedModelError(
        f"{type(layer).__name__} has no attention module that scores could be read from. {FIX}"
    )


def capture_qk(
    root: Any,
    attn: Any,
    hidden: Tensor,
    arguments: Mapping[str, Any],
    skipped: Iterable[str] = (),
    rows: Tensor | None = None,
    samples: tuple[int, slice | Tensor] | None = None,
) -> Captured:
    """Queries and keys that `attn` computes when `root` is called with `hidden` (S, n, d).

    Parameters
    ----------
    root
        `attn` itself, or the decoder layer around it.
    arguments
        Further arguments of the call, for these n columns.
    skipped
        Names of projections in `attn` whose results are not needed.
    rows : Tensor of int64, shape (S, R), or None
        Rows whose queries are needed; other rows may be zero. None: all.
    samples
        Number of samples of the model's batch, and those that `hidden` holds; None: all.

    Raises
    ------
    UnsupportedModelError
        The module does not call the backend that its config names, or changes logits in other ways.
    """
    # A copy of the module with our backend.
    compat.register_attention(NAME, _capture)
    clone = shallow_copy(attn)
    clone.config = AttributeView(attn.config, _attn_implementation=NAME)
    # Replace projections: only some samples, no values, only some rows of queries.
    stand_ins: dict[str, partial[Any]] = {}
    if samples is not None:
        for name, child in attn.named_children():
            if _takes_more(child):
                stand_ins[name] = partial(_whole_batch, child, *samples)
    if tensor_parallel_group(attn) is None:  # otherwise projections are narrower on each rank
        for name in skipped:
            width = getattr(getattr(attn, name, None), "out_features", None)
            if isinstance(width, int):
                stand_ins[name] = partial(_zeros, width)
    if rows is not None and isinstance(getattr(attn, "q_proj", None), nn.Module):
        stand_ins["q_proj"] = partial(_some_rows, stand_ins.get("q_proj", attn.q_proj), rows)
    # Run the copy itself, or a copy of the layer that contains it.
    run = clone
    if root is not attn:
        run = shallow_copy(unwrapped(root))
        name = next(name for name, child in run.named_children() if unwrapped(child) is attn)
        run._modules[name] = clone
    call = {"attention_mask": None, **arguments}
    if getattr(attn, "indexer", None) is not None:  # reads a mask before the backend is called
        stand_ins["indexer"] = partial(_constant, None)  # it changes neither queries nor keys
        call["attention_mask"] = hidden.new_ones(1, 1, 1, 1, dtype=torch.bool)
    if CHOICE in parameters_of(run) and call.get(CHOICE) is None:
        call[CHOICE] = hidden.new_zeros(1, 1, 1, dtype=torch.int32)
    if SHARED in parameters_of(run):  # a copy: the layer may write to it for later layers
        call[SHARED] = dict(arguments.get(SHARED) or {})
    # Functions become attributes: torch's FLOP counter expects only modules in `_modules`.
    for name, function in stand_ins.items():
        clone._modules.pop(name, None)
        clone.__dict__[name] = function
    try:
        type(run).forward(run, **compat.accepted(run, {"hidden_states": hidden, **call}))
    except Captured as captured:
        return captured.with_traceback(None)  # frames would keep all tensors of the call
    raise UnsupportedModelError(
        f"{type(attn).__name__} does not call the attention backend that its config names, so its "
        f"queries and keys are unknown. {FIX}"
    )


# -- queries and keys of questions at a layer -----------------------------------------------------

# Arguments of a layer that a probe does not pass: it handles padding itself.
LEFT_OUT = ("hidden_states", "attention_mask", "cache_position", *compat.CACHE_NAMES)


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
        visual = {c for s in self.spans for c in range(s.start, s.stop)}
        return [c for c in range(self.spans[0].start, self.stop) if c not in visual]


def questions_of(rows: RowMap) -> list[Question]:
    return [
        Question(b, prompt.start, prompt.question_stop, spans)
        for b, prompts in enumerate(rows.prompts)
        for prompt in prompts
        if (spans := rows.spans_of(b, prompt))
    ]


class Probe:
    """Queries and keys of the questions of a batch at one layer, at most one question per sample.

    Parameters
    ----------
    hidden : Tensor, shape (B, n, d)
        Input of the layer.

    Attributes
    ----------
    first, width
        First row of any of the questions, and number of rows up to the end of the last one.
    """

    def __init__(
        self,
        root: Any,
        attn: Any,
        hidden: Tensor,
        arguments: Mapping[str, Any],
        questions: list[Question],
    ) -> None:
        self.root, self.attn, self.questions = root, attn, questions
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
        self._hidden: Tensor = _of_samples(hidden, self, hidden.shape[1], False)
        self._arguments = {
            name: _of_samples(value, self, hidden.shape[1], "embeddings" in name)
            for name, value in arguments.items()
            if name not in LEFT_OUT
        }

    @property
    def device(self) -> torch.device:
        return self._hidden.device

    def of_samples(self, values: Tensor) -> Tensor:
        """Rows of values (B, …) of the samples of these questions."""
        if self.samples is None or isinstance(self.samples, slice):
            return values if self.samples is None else values[self.samples]
        return values[self.samples.to(values.device)]

    def columns(self, keys: Tensor) -> Tensor:
        """The part (S, kv heads, width, D) of keys (B, kv heads, n, D) that these questions
        span.
        """
        keys = keys if self.samples is None else keys[self.samples]
        if keys.shape[2] == self.width:
            return keys
        return keys.narrow(2, self.first, self.width)

    def queries(self, rows: Tensor | None) -> Captured:
        """Queries (S, heads, R, d) of rows (S, R), or of all rows; and the scaling factor."""
        return self._capture(rows, ("k_proj", "v_proj"))

    def queries_and_keys(self, rows: Tensor | None, cached: Any, past: RowMap) -> Captured:
        """`queries`, and the keys of all tokens; of a single sample preceded by keys of earlier
        turns.
        """
        from tokencomp.kernels import gather_rows

        sample, earlier = self.questions[0].sample, None
        if past.rows and not self.caches_keys(stored(cached, "keys")):
            both = (_earlier(x, past, sample) for x in (cached.keys, cached.values))
            earlier, past = Past(*both), RowMap(0)
        caches = {} if earlier is None else dict.fromkeys(compat.CACHE_NAMES, earlier)
        arguments = {**self._arguments, **caches}
        call = self.root, self.attn, self._hidden, arguments, ("v_proj",), rows
        captured = capture_qk(*call, samples=self._part)
        query = captured.query if rows is None else gather_rows([captured.query], rows, 2, 0)[0]
        return Captured(query, with_past(cached, past, sample, captured.key), captured.scaling)

    def unrotated_keys(self) -> Tensor:
        """Keys (S, kv heads, width, D) before the rotary embedding."""
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
        """Whether the cache holds the keys that attention reads.

        Latent attention may cache latents instead, which have another shape.
        """
        config = compat.layer_config(self.attn.config, self.attn.layer_idx)
        if getattr(config, "kv_lora_rank", None) is None:
            return True
        row = torch.zeros(len(self._hidden), 1, dtype=torch.int64, device=self._hidden.device)
        key = self._capture(row, ("q_proj",)).key
        return (keys.shape[1], keys.shape[-1]) == (key.shape[1], key.shape[-1])

    def _capture(self, rows: Tensor | None, skipped: tuple[str, ...]) -> Captured:
        hidden, arguments = self._hidden, self._arguments
        if rows is not None:
            hidden = _rows_of(hidden, rows, self.width, False)
            arguments = {
                name: _rows_of(value, rows, self.width, "embeddings" in name)
                for name, value in arguments.items()
            }
        call = self.root, self.attn, hidden, arguments, skipped
        return capture_qk(*call, samples=self._part)


def _of_samples(value: Any, probe: Probe, width: int, tables: bool) -> Any:
    """Select samples and columns of a probe from an argument; a batch axis of 1 is shared by all.

    Parameters
    ----------
    tables
        Whether tensors in `value` are rotary tables, (B, n, d) or (3, B, n, d). Other tensors are
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
    """Select `rows` (S, R) of a result of `_of_samples`."""
    if isinstance(value, Tensor):
        axis = value.ndim - 2 if tables else 1
        if value.ndim < 2 or value.shape[axis] != width:
            return value
        return take([value], rows.to(value.device), [axis])[0]
    return each(value, lambda item: _rows_of(item, rows, width, tables))


def _earlier(rows: Tensor, past: RowMap, sample: int) -> Tensor:
    """Real rows of earlier turns of one sample, of a cache layer's keys or values."""
    held = min(past.rows, rows.shape[2])  # a sliding layer holds only the last rows
    old, real = rows[sample : sample + 1, :, :held], past.mask(rows.device)
    return old if real is None else old[:, :, real[sample, past.rows - held :]]


def with_past(cached: Any, past: RowMap, sample: int, current: Tensor) -> Tensor:
    """Real keys of earlier turns of one sample, followed by its `current` keys."""
    if not past.rows:
        return current
    earlier = _earlier(stored(cached, "keys"), past, sample)
    return torch.cat([earlier.to(current.device), current], dim=2)
