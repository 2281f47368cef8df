"""Signals of the vision tower about visual tokens, without a change of its attention backend.

Keys, or the attention that every patch receives, are recomputed from the input of the attention of
some blocks, and passed on to the visual tokens of the decoder.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tokencomp.adapters.base import Adapter
from tokencomp.adapters.towers.base import TowerCall, attention_blocks
from tokencomp.engine.call import CallHooks, RunningCalls
from tokencomp.engine.capture import gather_heads
from tokencomp.errors import OptionError, SpanError
from tokencomp.plan.plan import Plan
from tokencomp.tokens.signals import Attention, Signal, TowerSignal
from tokencomp.tokens.tokens import VisualSpan
from tokencomp.torchlib import compat
from tokencomp.torchlib.replace import MethodReplacement


def watched_blocks(
    adapter: Adapter, signals: Collection[TowerSignal]
) -> list[tuple[nn.Module, list[TowerSignal]]]:
    """Attention modules that `signals` need, in order, and the signals of each."""
    blocks = attention_blocks(adapter.tower)
    blocks = blocks[: adapter.used_blocks(len(blocks))]
    by_place: dict[int, list[TowerSignal]] = {}
    for signal in signals:
        place = signal.place(len(blocks))
        if place is None:
            raise OptionError(
                f"a reducer reads block {signal.block} of the vision tower, but {adapter.family} "
                f"uses the blocks 0 … {len(blocks) - 1}. Choose one of them, counted from the end "
                "if negative, or a fraction of the depth below 1."
            )
        by_place.setdefault(place, []).append(signal)
    return [(blocks[place], by_place[place]) for place in sorted(by_place)]


def queries_and_keys(attn: Any, arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """q and k of all heads before any rotation, shape (B, S, heads, head_dim)."""
    x = arguments["hidden_states"]
    x = x[None] if x.ndim == 2 else x
    if hasattr(attn, "qkv"):
        q, k, _ = attn.qkv(x).unflatten(-1, (3, attn.num_heads, -1)).unbind(-3)
        return q, k
    q, k = attn.q_proj(x), attn.k_proj(x)
    q, k = getattr(attn, "q_norm", nn.Identity())(q), getattr(attn, "k_norm", nn.Identity())(k)
    # Under tensor parallelism a rank has some of the heads, but `num_heads` may count all.
    heads = (-1, attn.head_dim)
    q, k = q.unflatten(-1, heads), k.unflatten(-1, heads)
    return gather_heads(attn, q, dim=-2), gather_heads(attn, k, dim=-2)


def attention_received(
    q: Tensor,
    k: Tensor,
    cu_seqlens: Tensor | None,
    class_token: bool,
    lengths: Tensor | None = None,
) -> Tensor:
    """Attention that every patch receives, mean over heads, float32.

    From the class token if there is one (FasterVLM, arXiv 2412.01818), else the mean over all
    patches that may attend to it (VisionZip, arXiv 2412.04467). q and k (B, S, heads, head_dim)
    give (B, S); with `cu_seqlens`, the bounds of independent sequences, B = 1. Rows from `lengths`
    (B,) on are padding.
    """
    from tokencomp.kernels import attention_colsum

    # The class token is row 0: its attention alone, or the mean over all rows.
    rows = 1 if class_token and cu_seqlens is None else q.shape[1]
    if lengths is not None:
        stop, order = lengths[:, None].expand(-1, rows), torch.arange(rows, device=q.device)
        real = order < stop
        bounds = torch.zeros_like(stop), stop, torch.where(real, order, -1)
        visible, weights = torch.stack(bounds).int(), real / (stop if rows > 1 else 1.0)
    elif cu_seqlens is None:
        visible, weights = None, torch.full((rows,), 1.0 / rows, device=q.device)
    else:
        ends = torch.stack([cu_seqlens[:-1], cu_seqlens[1:]])
        # Every row of a packed picture sees the rows of the same picture.
        first, stop = ends.repeat_interleave(cu_seqlens.diff(), 1, output_size=rows)
        order = torch.arange(rows, device=q.device)
        visible = torch.stack([first, stop, order])[:, None].int()
        weights = 1.0 / (stop - first).float()
    q, k = q[:, :rows].transpose(1, 2), k.transpose(1, 2)
    # The bounds come from the tower.
    sums: Tensor = attention_colsum(q, k, weights, visible=visible, causal=False, trusted=True)
    return sums


# -- probes -------------------------------------------------------------------------------------


class TowerProbe(CallHooks):
    """Watches blocks of the vision tower for the signals that a plan needs.

    `noted`: whether a stage in the tower notes its calls.
    """

    def __init__(
        self,
        adapter: Adapter,
        calls: RunningCalls,
        signals: frozenset[TowerSignal],
        noted: bool = False,
    ) -> None:
        super().__init__(adapter, calls)
        self.signals, self.noted, self._heads = signals, noted, 1

    def install(self) -> None:
        """Hook the tower, and the method of the body that packs tiles, if there is one."""
        if not self.noted:
            self._before(self.adapter.tower, self._begin)
        for block, signals in watched_blocks(self.adapter, self.signals):
            self._before(block, functools.partial(self._record, signals))
        if packer := self.adapter.packer:
            self._handles.append(MethodReplacement(self.adapter.body, packer, self._pack))

    @property
    def _tower_calls(self) -> list[TowerCall]:
        """Calls of the tower within the running call of the model."""
        return self.calls.state.noted.encoded or []

    def _begin(self, tower: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        state = self.calls.state
        if not state.disabled and state.noted.encoded is not None:
            grids = compat.bind(tower, args, kwargs).get("grid_thw")
            state.noted.encoded.append(TowerCall(None, grids))

    @torch.no_grad()
    def _record(
        self, signals: list[TowerSignal], attn: nn.Module, args: Any, kwargs: dict[str, Any]
    ) -> None:
        """Record `signals` of one block."""
        calls = self._tower_calls
        if self.calls.state.disabled or not calls:  # none: a backward pass runs the block again
            return
        arguments, rows = compat.bind(attn, args, kwargs), calls[-1].rows
        q, k = queries_and_keys(attn, arguments)
        self._heads = k.shape[-2]
        for signal in signals:
            if signal.part == "keys":
                values = k.flatten(-2).float()
            else:
                tables = arguments.get("position_embeddings")
                turned = compat.rotate_vision(attn, q, k, *tables) if tables else (q, k)
                options = self.adapter.class_token, rows.lengths if rows else None
                bounds = arguments.get("cu_seqlens")
                values = attention_received(*turned, bounds, *options)[..., None]
            # Full length, where a stage in the tower has dropped rows.
            values = values if rows is None else rows.full_length(values)
            calls[-1].values[signal] = values

    def _pack(self, original: Callable[..., Any], features: Any, *args: Any, **kwargs: Any) -> Any:
        """Call the packer of the body, and record how it was called."""
        if calls := self._tower_calls:
            # `Adapter.tower_tokens` packs the recorded values in the same way, but without line
            # breaks: it passes `image_newline=None` itself.
            kwargs_now = {k: v for k, v in kwargs.items() if k != "image_newline"}
            calls[-1].packing = [len(f) for f in features], args, kwargs_now
        return original(features, *args, **kwargs)

    def collect(self, spans: list[list[VisualSpan]]) -> dict[Signal, list[list[Tensor]]]:
        """Values of every span by signal, float32, see `TowerSignal`; 0 where there is no patch.

        `spans` are those of every row of the batch, whose media the latest calls of the tower must
        have encoded (`SpanError` if the caller passed features, or media of another prompt).
        """
        modalities = [
            k for k in ("image", "video") if any(s.modality == k for row in spans for s in row)
        ]
        # The tower runs once for all images and then once for all videos.
        calls = self._tower_calls[-len(modalities) :] if modalities else []
        if len(calls) < len(modalities):
            raise SpanError(
                "the reducer reads the vision tower's attention, but the tower did not run for "
                "this prompt. Pass pixels, not precomputed features, or use another signal."
            )
        values: dict[Signal, list[list[Tensor]]] = {}
        # From patches to visual tokens, then to spans.
        for name in self.signals:
            tokens: dict[str, Tensor] = {}
            for modality, call in zip(modalities, calls, strict=True):
                table = self.adapter.tower_tokens(call.values[name], modality, call)
                keys = name.part == "keys"
                tokens[modality] = table.unflatten(-1, (self._heads, -1)) if keys else table[:, 0]
            values[name] = _spread(spans, tokens)
        return values


SOURCES = {
    "query": "the text of the question",
    "attention": "the attention of decoder layers",
    "tower": "the vision tower's attention",
    "norm": "the norm after the last decoder layer",
    "frames": "the frames before",
}


def check_signals(plan: Plan, adapter: Adapter) -> frozenset[TowerSignal]:
    """Signals of the vision tower that the reducers of `plan` need.

    Refused are signals that the model does not offer, and two of the decoder's attention.
    """
    for stage in plan.stages:
        for signal in stage.needs:
            norm = signal.source == "norm" and adapter.final_norm is not None
            if not norm and signal.source not in adapter.signals:
                raise OptionError(
                    f"reducer {stage.reducer.name!r} reads {SOURCES[signal.source]}, which "
                    f"{adapter.family} does not offer. Use another signal or metric."
                )
        if sum(isinstance(signal, Attention) for signal in stage.needs) > 1:
            raise OptionError(
                f"reducer {stage.reducer.name!r} reads the decoder's attention in two ways, but "
                "`Tokens.scores` holds one. Let `needs` name one Attention."
            )
    signals = frozenset(signal for signal in plan.needs if isinstance(signal, TowerSignal))
    if signals:
        watched_blocks(adapter, signals)
    return signals


def _spread(spans: list[list[VisualSpan]], tokens: dict[str, Tensor]) -> list[list[Tensor]]:
    """Distribute values of patches, in order, to spans.

    Beam search repeats every sample of a batch, one copy after the other, but the tower encodes
    each medium once. The number of copies follows from the number of tokens per encoded value; it
    must be a whole number and the same for images and videos.
    """
    total = {
        name: sum(math.prod(s.grid) for row in spans for s in row if s.modality == name)
        for name in tokens
    }
    times = {n / max(len(tokens[name]), 1) for name, n in total.items()} or {1.0}
    copies = int(min(times))
    if times != {copies} or len(spans) % copies:
        counts = [f"{len(tokens[k])} {k} patches for {n} tokens" for k, n in total.items()]
        raise SpanError(
            f"the vision tower encoded {', '.join(counts)}, which are not the media of this "
            "prompt. Let one call encode and read them, or use a reducer that does not read the "
            "tower's attention."
        )
    # One copy of every row in the order of the tower, then repeated.
    rows, parts = spans[::copies], dict[str, Iterator[Tensor]]()
    for modality, values in tokens.items():
        of_it = [span for row in rows for span in row if span.modality == modality]
        parts[modality] = iter(_of_tokens(values, of_it).split([span.length for span in of_it]))
    tables = [[next(parts[span.modality]) for span in row] for row in rows]
    return [row for row in tables for _ in range(copies)]


def _of_tokens(values: Tensor, spans: list[VisualSpan]) -> Tensor:
    """Values of the patches of spans as values of all their tokens, 0 where there is no patch."""
    fixed = np.concatenate([span.fixed_mask() for span in spans])
    if not fixed.any():
        return values
    places = torch.from_numpy(np.flatnonzero(~fixed)).to(values.device)
    return values.new_zeros(len(fixed), *values.shape[1:]).index_copy_(0, places, values)
