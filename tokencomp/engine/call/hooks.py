"""The hooks: the only code that touches arguments of Hugging Face modules.

top
    Notes `labels` and `logits_to_keep`, which say whether the output must have full length.
body
    Notes where visual placeholders are, if the call carries visual features.
decoder
    Before the call, applies the entry stage and sets masks and positions. After it, compresses the
    cache layers and gives the output its full length.
rotary
    Gets the original positions of the kept tokens, in decoders with one position per token.

The hooks on decoder layers, their attention and the vision tower depend on the plan, see
`tokencomp.engine.call.plan_hooks`.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from transformers.cache_utils import StaticLayer

from tokencomp.adapters.base import Adapter
from tokencomp.adapters.structure import parameters_of
from tokencomp.engine.cache.check import check_cache
from tokencomp.engine.cache.layers import CompressedLayer, InForce
from tokencomp.engine.cache.need import PatchNeed
from tokencomp.engine.call.batching import BatchGuard
from tokencomp.engine.call.chunks import ChunkedPrefill, whole_output
from tokencomp.engine.call.embeddings import with_embeddings
from tokencomp.engine.call.entry import enter_prompt
from tokencomp.engine.call.gate import CallGate
from tokencomp.engine.call.generate import GenerateCall
from tokencomp.engine.call.later import LaterTokens, compact_cache, first_layer, split_mask
from tokencomp.engine.call.notes import CallNotes
from tokencomp.engine.call.plan_hooks import PlanHooks
from tokencomp.engine.call.reading import PrefillCall, PromptReader
from tokencomp.engine.call.state import RunningCalls
from tokencomp.engine.count.stats import Stats, collect, warn_if_ratio_missed
from tokencomp.engine.kinds.relative import RelativePositions
from tokencomp.engine.kinds.windows import Windows
from tokencomp.engine.rows.outputs import restore_states
from tokencomp.engine.scores.parallel import refuse_replica
from tokencomp.engine.scores.proportional import ProportionalAttention
from tokencomp.engine.scores.recomputed import Recomputation
from tokencomp.engine.stage.forward import ForwardPass
from tokencomp.engine.stage.segments import check_entered
from tokencomp.engine.stage.survivors import refuse_missing
from tokencomp.errors import copy_error
from tokencomp.plan.plan import Plan
from tokencomp.torchlib import compat
from tokencomp.torchlib.replace import Hooked

# Bodies that have had a tower stage: their features may come later, with tokens missing.
_HAD_TOWER: WeakSet[nn.Module] = WeakSet()


class Hooks(Hooked):
    """Installs and removes the hooks of one patched model.

    What belongs to a running call lives in thread-local storage; `stats` is shared: the counts of
    the prefill that ended last, in whichever thread. Dynamo cannot trace the callbacks, so they
    run between the graphs of a compiled model.

    A plan without stages has no hooks, unless what an earlier plan has left may still come.

    Parameters
    ----------
    strict
        Whether prompts without media are refused.
    compact_positions
        Whether positions count the kept tokens only.
    """

    def __init__(
        self,
        adapter: Adapter,
        plan: Plan,
        strict: bool,
        compact_positions: bool = False,
    ) -> None:
        Windows.of(adapter.decoder)  # refuses kinds of layers that are not known
        self.adapter, self.plan = adapter, plan
        self.compact_positions = compact_positions
        self.stats: Stats | None = None
        self._missed_plans: set[str] = set()  # plans that have warned of a missed ratio
        self._calls = calls = RunningCalls()
        self._weights = ProportionalAttention(adapter.layers, self._sizes)
        self._recomputation = Recomputation(calls)
        self._notes = CallNotes(adapter, calls, strict)
        self._plan_hooks = PlanHooks(adapter, calls, off=lambda: self.disabled)
        self._in_force = InForce(compact_positions)
        self._later = LaterTokens(adapter, calls, self._in_force, self._weights)
        self._relative = RelativePositions(adapter, calls)
        self._batches = BatchGuard(adapter, self._compresses, strict)
        self._prefill = ChunkedPrefill(adapter, calls, self._compresses)
        self.gate = CallGate(adapter.top, adapter.body)
        self._generate = GenerateCall(adapter, self.gate, calls)
        self._reader = PromptReader(adapter, self._generate)
        self._parts: list[Any] = [self._relative, self._prefill, self._batches, self._generate]
        # Qwen2-VL before transformers 5 swallows the argument and returns all logits.
        self._slices = "logits_to_keep" in parameters_of(adapter.top)

    # -- installation ---------------------------------------------------------------------------

    def install(self) -> None:
        """Put the plan in force, between the calls of all threads."""
        if self._needed():
            with self.gate.change():
                self._hook()

    def change(self, plan: Plan) -> None:
        """Put another plan in force, between the calls of all threads.

        Outer hooks stay as long as any are needed: another thread may wait at the gate with a call
        for which torch has already read the list of its hooks.
        """
        if not (self._handles or plan.active or self._needed()):
            self.plan, self.stats = plan, None
            return
        with self.gate.change():
            self._plan_hooks.remove()
            self.plan, self.stats = plan, None
            if not (self._needed() or self.gate.busy()):
                self._unhook()
            elif self._handles:
                self._install_plan()
            else:
                self._hook()

    def _needed(self) -> bool:
        """Whether anything must be done to calls: to prompts, or to what earlier plans have left.

        Those are caches that only a patched model reads right, and features with tokens missing.
        """
        return self.plan.active or self.adapter.body in _HAD_TOWER or PatchNeed.is_held()

    def _hook(self) -> None:
        a, add = self.adapter, self._handles.append
        for module, pre, post in (
            (a.top, self._top, self._top_done),
            (a.body, self._body, self._body_done),
            (a.decoder, self._decoder, self._decoder_done),
        ):
            add(module.register_forward_pre_hook(pre, with_kwargs=True))
            add(module.register_forward_hook(post, with_kwargs=True, always_call=True))
        if not a.mrope and a.rotary is not None:
            add(a.rotary.register_forward_pre_hook(self._rotary, with_kwargs=True))
        self._install_plan()
        for part in (*self._parts, a):
            part.install()
        compat.forget_compiled()
        self._in_force.active = True

    def _install_plan(self) -> None:
        self._plan_hooks.install(self.plan)
        if self.plan.merges_rest:  # stays until `remove`: caches remember the weights of their rows
            self._weights.install()
        if self.plan.tower is not None:
            _HAD_TOWER.add(self.adapter.body)

    def _unhook(self) -> None:
        self._in_force.active = False
        super().remove()
        weights = (self._weights, self._recomputation)
        for part in (*reversed(self._parts), *weights, self._plan_hooks, self.gate):
            part.remove()
        self.adapter.uninstall()
        compat.forget_compiled()

    def remove(self) -> None:
        """Undo `install`, between the calls of all threads; safe to call twice."""
        if self._handles or self.gate.installed:
            with self.gate.change():
                self._unhook()

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise copy_error(type(self.adapter.model).__name__)

    @property
    def disabled(self) -> bool:
        return self._calls.running.disabled > 0

    def disable(self, by: int) -> None:
        """Count calls of `Handle.disabled()` in this thread up or down."""
        self._calls.own.disabled += by

    def _compresses(self) -> bool:
        """Whether prompts with media are compressed in this thread."""
        return self.plan.active and not self.disabled

    # -- top and body ---------------------------------------------------------------------------

    def _traced(self, arguments: dict[str, Any]) -> bool:
        """Whether Dynamo may trace through a hook: it does nothing, or tensor operations."""
        return self._calls.running.kinds is None and self._later.traceable(
            arguments, self.plan.active
        )

    # A call that has waited at the gate may find the hooks gone, which torch then calls without
    # keyword arguments.

    def _top(self, module: nn.Module, args: Any, kwargs: Any = None) -> None:
        refuse_replica(module)
        if kwargs is None:
            return
        arguments = compat.bind(module, args, kwargs)
        if not self._traced(arguments):
            self._notes.note_call(arguments, self._slices)

    def _top_done(self, module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        if not self._traced(compat.bind(module, args, kwargs)):
            self._notes.forget_call()

    def _body(self, module: nn.Module, args: Any, kwargs: Any = None) -> None:
        if kwargs is None:
            return
        arguments = compat.bind(module, args, kwargs)
        if not self._traced(arguments):
            self._note_prompt(arguments)

    @compat.not_compiled
    def _note_prompt(self, arguments: dict[str, Any]) -> None:
        if self._notes.note_prompt(arguments, self._compresses()):
            self.stats = None  # not those of another prompt
            self._notes.without_features(arguments)

    def _body_done(self, module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        state = self._calls.running
        if state.inputs is not None or state.forward is not None:
            self._notes.forget_prompt()

    # -- decoder --------------------------------------------------------------------------------

    def _decoder(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        kwargs = compat.bind(module, args, kwargs)
        if not self._traced(kwargs):
            return self._decoder_call(module, kwargs, torch.compiler.is_compiling())
        cache = compat.get_cache(kwargs)
        if not isinstance(first_layer(cache), CompressedLayer):
            return None
        kwargs = dict(kwargs)
        self._later.prepare(kwargs, cache.layers)
        return (), kwargs

    @compat.not_compiled
    def _decoder_call(self, module: nn.Module, kwargs: dict[str, Any], traced: bool) -> Any:
        """Arguments of a decoder call, whose layers then have the hooks that they need.

        Parameters
        ----------
        traced
            Whether Dynamo has compiled the caller.
        """
        arguments = self._arguments(module, kwargs)
        forward = self._calls.running.forward
        needed = forward is not None and len(forward.segments) > 1
        self._plan_hooks.layers.prepare(needed, traced)
        return arguments

    def _arguments(self, module: nn.Module, kwargs: dict[str, Any]) -> Any:
        """Arguments of a decoder call; None where they stay as they are."""
        kinds, cache = self._calls.running.kinds, compat.get_cache(kwargs)
        if self._compresses() and not self.gate.inside(self.adapter.top, self.adapter.body):
            self._notes.called_alone(kwargs)
        if kinds is not None and kinds.numpy().any():
            if kwargs.get("inputs_embeds") is None:
                kwargs = with_embeddings(module, kwargs)
            if self.plan.tower is None:
                self._refuse_missing(kwargs)
            check_cache(cache, bool(self.plan.layer_stages))
            self._later.adopt(getattr(cache, "layers", []))
            state = self._calls.own
            kwargs, prepared = split_mask(kwargs, cache, state.body_mask)
            forward = state.forward = self._compress(kwargs, kinds, cache, prepared)
            whole = len(forward.segments) > 1 or state.logits > forward.tail
            if whole and "logits_to_keep" in kwargs:
                # Decoders with shared keys (Gemma 4) cut their hidden states to these columns.
                kwargs["logits_to_keep"] = 0
            return (), self._prefill.advance(module, kwargs, forward, state.logits)
        self._refuse_missing(kwargs)
        if isinstance(first_layer(cache), CompressedLayer):
            kwargs = dict(kwargs)
            self._later.prepare(kwargs, cache.layers)
            return (), kwargs
        return None

    def _refuse_missing(self, kwargs: dict[str, Any]) -> None:
        """Refuse features of a tower stage in a call whose plan, or lack of one, has none.

        NaN in features that this call has encoded itself is the model's own.
        """
        if self.adapter.body not in _HAD_TOWER or kwargs.get("inputs_embeds") is None:
            return
        state = self._calls.running
        if not (state.encodes or self.adapter.encodes(state.inputs or {})):
            refuse_missing(kwargs["inputs_embeds"])

    def _compress(
        self, kwargs: dict[str, Any], kinds: Tensor, cache: Any, prepared: Any
    ) -> ForwardPass:
        """Read a prefill with visual tokens, and change its arguments by the entry stage."""
        state = self._calls.running
        call = PrefillCall(kwargs, kinds, cache, state.inputs or {}, state.labels, state.drafts)
        forward, positions = self._reader.read(call, self.plan)
        forward.prepared = prepared
        if self.plan.merges_rest and compat.recomputed(self.adapter.layers[0]):
            self._recomputation.prepare(self.adapter.layers)
        if self._plan_hooks.tower is not None:
            forward.tower = self._plan_hooks.tower.collect(forward.spans)
        if self._plan_hooks.drop is not None:
            media = {s.kind for row in forward.spans for s in row} - {"audio"}
            forward.tower_costs = self._plan_hooks.drop.collect(len(media))
        enter_prompt(self.adapter, forward, positions, kwargs, cache, self.compact_positions)
        return forward

    @compat.not_compiled
    def _sizes(self, layer: int, keys: int) -> Tensor | None:
        """How many tokens the first of `keys` rows of `layer` stand for in the call that runs now.

        A layer with a window hands the last of its rows to attention, and `sizes` begin with the
        first row of the sequence.
        """
        state = self._calls.running
        forward, cached = state.recomputed or state.forward, state.cached
        if forward is not None:
            segment = forward.segment_of(layer)
            sizes, rows = forward.weights(segment), segment.physical + segment.layout.width
            gone = rows - keys if forward.chunk is None else 0  # a chunk has the first rows alone
        elif cached:
            own = cached[min(layer, len(cached) - 1)]  # later layers share the keys of earlier ones
            sizes = own.sizes
            gone = 0 if isinstance(own, StaticLayer) else own.rows - keys
        else:
            return None
        return sizes if sizes is None or gone <= 0 else sizes[:, gone:]

    def _decoder_done(self, module: nn.Module, args: Any, kwargs: Any, out: Any) -> Any:
        state = self._calls.running
        if state.forward is None and state.cached is None:
            return None
        return self._finish_decoder(module, kwargs, out)

    @compat.not_compiled
    def _finish_decoder(self, module: nn.Module, kwargs: dict[str, Any], out: Any) -> Any:
        """The output of a decoder call with full length; None where it stays as it is."""
        state = self._calls.own
        forward, state.forward, state.cached = state.forward, None, None
        self._plan_hooks.layers.finish()
        if forward is None or out is None:
            return None
        check_entered(forward.segments, module)
        cache = compat.get_cache(kwargs, out)
        if getattr(out, "attentions", None) is not None:
            out.attentions = forward.full_maps(out.attentions)
        if not forward.compresses:
            forward.extend_valid(cache)
            return out
        compact_cache(forward, cache, self._in_force)
        out = whole_output(out, forward.earlier)
        self.stats = stats = collect(forward, cache)
        warn_if_ratio_missed(stats, forward.plan, self._missed_plans)
        text_only = 0 < state.logits <= forward.tail
        return restore_states(out, forward.layer_layouts(), forward.width, text_only)

    # -- positions ------------------------------------------------------------------------------

    def _rotary(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._calls.running.forward is None:
            return None
        return self._true_positions(args, kwargs)

    @compat.not_compiled
    def _true_positions(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        forward = self._calls.running.forward
        if forward is None or forward.rotary is None:
            return None
        if "position_ids" in kwargs:
            return args, {**kwargs, "position_ids": forward.rotary}
        hidden, _, *rest = args
        return (hidden, forward.rotary, *rest), kwargs
