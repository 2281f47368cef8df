"""The pass `layers`: gives the decoder layers of a segment the arguments for its rows.

The decoder prepares masks, positions and rotary tables for the rows of segment 0. Layers of later
segments get those of their rows; the first layer of a segment runs its stage first:

    hidden states ─► [stage] ─► rows, mask, positions, tables, per-row arguments ─► layer
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from tokencomp.adapters.base import Adapter
from tokencomp.adapters.structure import parameters_of
from tokencomp.engine.call import Call, CallHooks, RunningCalls, Segment
from tokencomp.engine.capture import attention_of
from tokencomp.engine.checks import refuse_recomputation, scored_stages
from tokencomp.engine.choose import run_stage
from tokencomp.engine.gather import (
    SET_APART,
    gather_arguments,
    sequence_lengths,
    take,
    text_positions,
)
from tokencomp.engine.layer_types import CONVOLUTION, LayerType
from tokencomp.engine.masks import Masks
from tokencomp.errors import RowIndexedAttentionError
from tokencomp.plan.plan import Plan
from tokencomp.torchlib import compat
from tokencomp.torchlib.hooks import Hooked
from tokencomp.torchlib.replace import MethodReplacement

# Arguments that `LayerHooks._layer` sets itself.
APART = {"hidden_states", "position_embeddings", *SET_APART} - {"input_ids"}
DISTANCE = "relative_distance"  # argument of decoder layers, int64 (queries, keys)
POSITIONS = ("query_positions", "key_positions")  # of the module of a bias, int64 (n,)


class LayerHooks(CallHooks):
    """Hooks on the decoder layers, active while layers differ in their rows, cached or new.

    That is so for prompts with stages between layers, and for later tokens with their caches; in
    other calls the hooks return at once. Once installed they remain until the patch is removed,
    because a compressed cache can outlive its plan.
    """

    def __init__(self, adapter: Adapter, calls: RunningCalls) -> None:
        super().__init__(adapter, calls)
        self._plan = Plan()
        self._staged = False
        self.hooked: list[nn.Module] = []
        self._scores = CallHooks(adapter, calls)  # of attention modules that score

    def install(self, plan: Plan) -> None:
        """Hook the layers and the attention modules that score for a stage of `plan`."""
        self._plan, self._staged = plan, self._staged or bool(plan.layer_stages)
        if self._staged and not self._handles:
            self.hooked = list(self.adapter.layers)
            for i, layer in enumerate(self.hooked):
                # Before hooks of other libraries, which then see the rows of the layer.
                run = functools.partial(self._layer, i)
                self._before(layer, run, traced=self._has_call, prepend=True)
        for stage, number, signal in scored_stages(plan, self.adapter):
            score = functools.partial(self._score, stage, number, signal)
            # Before the hook of FSDP2, which reshards the weights after the call.
            attn = attention_of(self.adapter.layers[number])
            self._scores._after(attn, score, traced=self._has_call, prepend=True)

    def follow_wrappers(self) -> None:
        """Move the hooks to wrappers that were added since (`CheckpointWrapper`)."""
        self.remove()
        self.install(self._plan)

    def withdraw(self) -> None:
        """Remove the hooks that only the current plan needs."""
        self._scores.remove()

    def remove(self) -> None:
        """Remove all hooks; safe to call twice."""
        self.withdraw()
        super().remove()
        self.hooked = []

    def _layer(self, i: int, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Arguments of layer `i` with rows, tables and mask of its segment; None in segment 0."""
        state = self.calls.state
        call: Any = state.call
        if call is None:
            return None
        segment = call.segment_of[i]
        if segment.first == 0:
            return None
        if state.noted.grad:
            refuse_recomputation(self.adapter.decoder, "the stages between layers")
        # Decoders that pass masks and tables by place instead of by name.
        if len(args) > 1:
            args, kwargs = args[:1], compat.bind(module, args, kwargs)
            kwargs.pop("hidden_states", None)
        kwargs = dict(kwargs)
        hidden = args[0] if args else kwargs["hidden_states"]
        # The first layer of the segment runs the stage. Every argument gets the segment's rows.
        if not segment.ready:
            hidden = _begin_segment(call, segment, hidden, kwargs)
        layer_type = call.layer_types.types[i]
        kwargs.update(_row_arguments(segment, kwargs, call.segments[0].new.rows))
        kwargs["attention_mask"] = _mask(call, segment, layer_type, hidden)
        if "conv_mask" in kwargs:
            kwargs["conv_mask"] = _mask(call, segment, CONVOLUTION, hidden)
        kwargs["position_ids"] = _positions(call, segment, kwargs)
        kwargs.update(segment.lengths)
        if "position_embeddings" in kwargs:
            tables = _tables(segment, layer_type.name, kwargs, hidden.device)
            kwargs["position_embeddings"] = tables
        if args:
            return (hidden,), kwargs
        return args, {**kwargs, "hidden_states": hidden}

    def _score(
        self, stage: int, layer: int, signal: Any, module: nn.Module, args: Any, *rest: Any
    ) -> None:
        call: Any = self.calls.state.call
        if call is not None and call.scores is not None:
            arguments = compat.bind(module, args, rest[0])
            x, past = arguments["hidden_states"], call.segment_of[layer].past
            cache, started = compat.get_cache(arguments), time.perf_counter()
            call.scores.add(stage, x, arguments, signal, call.map, cache, past, ran=module)
            call.scores.seconds += time.perf_counter() - started


def _begin_segment(call: Call, segment: Segment, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """First layer of a segment: run its stage, if any, then set what its layers share.

    The stage takes hidden states (B, n, d), and their rotary tables as its `arguments`.
    """
    previous = call.segments[call.segments.index(segment) - 1]
    segment.index, device = previous.index, hidden.device
    if segment.stage is not None:
        layer_type = call.layer_types.types[segment.first].name
        tables = _tables(previous, layer_type, kwargs, device)
        ids = _positions(call, previous, kwargs)
        arguments = {"position_embeddings": tables, "position_ids": ids}
        # Rotary tables are cosine and sine, one complex tensor, or none. They, and the rows of
        # segment 0, are gathered with the hidden states.
        parts = [*tables] if isinstance(tables, tuple) else [] if tables is None else [tables]
        index = previous.index
        if index is None:
            index = torch.arange(hidden.shape[1], device=device)[None]
        tensors, dims = [hidden, index, *parts], [1, 1] + [-2] * len(parts)
        hidden, segment.index, *parts = run_stage(call, segment.stage, tensors, dims, arguments)
        segment.tables[layer_type] = parts
    # Later tokens have no spans: their rows are the same in every segment.
    if call.spans:
        segment.new = call.map
    if call.segments[0].new.packed:  # a stage moves prompts, and removes none
        segment.lengths = sequence_lengths(segment.new, kwargs)
        if compat.get_cache(kwargs) is None:
            # Without a mask and a cache, transformers infers packed prompts from positions.
            segment.text_positions = text_positions(segment.new, device)
    segment.ready = True
    return hidden


def _positions(call: Call, segment: Segment, kwargs: Mapping[str, Any]) -> Tensor | None:
    """`position_ids` for the layers of a segment.

    Layers that use positions themselves get those of the kept rows. Otherwise (`rotary` is set, or
    positions are the M-RoPE row that counts text) they get positions without gaps, because
    transformers takes a gap for the start of another packed prompt.
    """
    adapter, positions = call.adapter, cast(Tensor | None, kwargs.get("position_ids"))
    reads = adapter.layers_read_positions and call.rotary is None
    if positions is None or not reads or (adapter.mrope and positions.ndim < 3):
        return segment.text_positions
    if segment.index is None:
        return positions
    index = segment.index.to(positions.device)
    axes = positions.shape[:-2]  # axes of M-RoPE precede the samples
    positions = positions.expand(*axes, len(index), -1)
    return positions.gather(-1, index.expand(*axes, -1, -1))


def _mask(call: Call, segment: Segment, layer_type: LayerType, hidden: Tensor) -> Any:
    """The mask of one layer type in a segment, built once."""
    if layer_type.name not in segment.masks:
        made = Masks(call).of(layer_type, segment, hidden, segment.text_positions)
        segment.masks[layer_type.name] = made
    return segment.masks[layer_type.name]


def _row_arguments(segment: Segment, kwargs: Mapping[str, Any], width: int) -> dict[str, Any]:
    """Gather further arguments of a layer with one entry per row, such as per-layer inputs.

    `width`: number of rows of segment 0.
    """
    if segment.index is None:
        return {}
    others = {
        name: value
        for name, value in kwargs.items()
        if name not in APART and isinstance(value, Tensor) and value.ndim > 1
    }
    if others:
        mask = segment.new.mask(segment.index.device)
        gather_arguments(others, segment.index, mask, width)
    return others


def _tables(
    segment: Segment, layer_type: str, kwargs: Mapping[str, Any], device: torch.device
) -> Any:
    """Rotary tables of a layer for the rows of `segment`; they can differ by layer type."""
    tables = kwargs.get("position_embeddings")
    if tables is None or segment.index is None:
        return tables
    if not segment.tables.get(layer_type):
        parts = [t.to(device) for t in (tables if isinstance(tables, tuple) else (tables,))]
        index, mask = segment.index.to(device), segment.new.mask(device)
        segment.tables[layer_type] = take(parts, index, [-2] * len(parts), mask)
    moved = tuple(t.to(device) for t in segment.tables[layer_type])
    return moved if isinstance(tables, tuple) else moved[0]


# -- biases by distance --------------------------------------------------------------------------


class RelativePositions(Hooked):
    """Attention biases by the distance of two tokens, which transformers counts in rows (Inkling).

    After dropping, row distance is smaller than token distance. In a compressed call the bias is
    computed from columns, so distances do not change; compact positions count rows. Hooks act where
    the decoder passes distances to a layer, or positions to the module of the bias; a layer with
    such a bias that takes neither is refused (`RowIndexedAttentionError`).
    """

    def __init__(self, adapter: Adapter, calls: RunningCalls) -> None:
        self.calls = calls
        self._layers: dict[int, nn.Module] = {}
        self._biases: list[tuple[int, nn.Module]] = []
        extent = getattr(adapter.decoder.config, "rel_extent", None)
        if not isinstance(extent, int):
            return
        for i, layer in enumerate(adapter.layers):
            biases = [m for m in layer.modules() if set(POSITIONS) <= set(parameters_of(m))]
            if DISTANCE in parameters_of(layer):
                self._layers[i] = layer
            elif biases:
                self._biases += [(i, module) for module in biases]
            else:
                raise RowIndexedAttentionError(
                    f"{type(layer).__name__}: attention adds a bias by the number of rows between "
                    f"two tokens, up to {extent} (rel_extent of its config), in a way that is not "
                    "known, so that dropping a token would not equal masking it. Run it without "
                    "patch()."
                )

    def install(self) -> None:
        """Hook the layers, or the modules of their biases."""
        for i, layer in self._layers.items():
            hook = functools.partial(self._layer, i)
            self._handles.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
        for i, module in self._biases:
            bias = functools.partial(self._bias, i)
            self._handles.append(MethodReplacement(module, "forward", bias))

    @compat.not_compiled
    def _columns(self, layer: int, batch: int, device: torch.device) -> Tensor | None:
        """Columns of all rows of layer `layer`, (B, rows); None if they equal row numbers."""
        call = self.calls.state.call
        if call is None or not call.by_column:
            return None
        columns: Tensor | None = call.segment_of[layer].columns(batch, device)
        return columns

    def _layer(self, i: int, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        kwargs = compat.bind(module, args, kwargs)
        hidden, distance = kwargs["hidden_states"], kwargs[DISTANCE]
        columns = self._columns(i, hidden.shape[0], hidden.device)
        if columns is None:
            return None
        # The last columns: a sliding cache holds only the last keys.
        queries, keys = columns[:, -distance.shape[0] :], columns[:, -distance.shape[1] :]
        return (), {**kwargs, DISTANCE: (queries[:, :, None] - keys[:, None])[:, None]}

    def _bias(
        self,
        i: int,
        original: Callable[..., Tensor],
        states: Tensor,
        query_positions: Tensor,
        key_positions: Tensor,
    ) -> Tensor:
        columns = self._columns(i, states.shape[0], states.device)
        if columns is None:
            return original(states, query_positions, key_positions)
        queries, keys = (columns[:, -len(p) :] for p in (query_positions, key_positions))
        # Columns differ by sample, and the module takes one row of positions.
        samples = zip(states.split(1), queries, keys, strict=True)
        return torch.cat([original(*sample) for sample in samples])
