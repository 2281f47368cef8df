"""What a patch does before, within and after a call of the decoder.

Before the call, the entry stage is applied, and masks and positions are set. After it, the cache
layers are compressed, and the output gets its full length.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tokencomp.adapters.base import Adapter
from tokencomp.engine.cache.compress import check_cache, compact_cache, extend_valid
from tokencomp.engine.cache.layers import CompressedLayer
from tokencomp.engine.cache.owner import CacheOwner
from tokencomp.engine.cache.rows import first_layer
from tokencomp.engine.call.chunks import ChunkedPrefill, whole_output
from tokencomp.engine.call.embeddings import with_embeddings
from tokencomp.engine.call.entry import enter_prompt
from tokencomp.engine.call.later import LaterTokens, begins_prompt
from tokencomp.engine.call.layer_hooks import LayerHooks, SharedTables
from tokencomp.engine.call.reading import read_prompt
from tokencomp.engine.call.refusals import (
    TRACED,
    FeaturelessPrompts,
    refuse_recomputation,
    rotary_modules,
)
from tokencomp.engine.call.state import CallHooks, CallState, RunningCalls
from tokencomp.engine.call.weights import RowWeights
from tokencomp.engine.count.collect import MissedRatios, collect
from tokencomp.engine.count.stats import Stats
from tokencomp.engine.layer_types.prepared_mask import split_mask
from tokencomp.engine.rows.outputs import restore_maps, restore_states
from tokencomp.engine.stage.segments import check_entered
from tokencomp.engine.stage.survivors import refuse_missing
from tokencomp.engine.tower.hooks import TowerHooks
from tokencomp.errors import UnsupportedModelError
from tokencomp.plan.plan import Plan
from tokencomp.torchlib import compat


class DecoderHooks(CallHooks):
    """Compresses what the decoder gets, and puts the plan in force on its layers and the tower.

    Attributes
    ----------
    plan
        The plan in force.
    stats
        Counts of the compressed prefill that ended last, in whichever thread.
    """

    def __init__(
        self,
        adapter: Adapter,
        calls: RunningCalls,
        plan: Plan,
        owner: CacheOwner,
        prefill: ChunkedPrefill,
        featureless: FeaturelessPrompts,
    ) -> None:
        super().__init__(adapter, calls)
        self.plan = plan
        self.stats: Stats | None = None
        self._owner, self._prefill, self._featureless = owner, prefill, featureless
        self._missed = MissedRatios()
        self._weights = RowWeights(adapter, calls)
        self._later = LaterTokens(adapter, calls, owner.compact)
        self._layers, self._tables = LayerHooks(adapter, calls), SharedTables(adapter, calls)
        self.tower = TowerHooks(adapter, self.is_off)

    # -- installation ---------------------------------------------------------------------------

    def install(self) -> None:
        """Hook the decoder, and its rotary modules where they must get other positions."""
        a = self.adapter
        before = a.decoder.register_forward_pre_hook(self._decoder, with_kwargs=True)
        self._handles.append(before)
        self._after(a.decoder, self._leave, self._entered, always_call=True)
        for module in rotary_modules(a.decoder):
            if not a.mrope:
                self._before(module, self._true_positions, self._has_forward)
        self.put_in_force()

    def put_in_force(self) -> None:
        """Hook what the stages of the plan need inside of the decoder and the tower."""
        for part in (self._layers, self._tables, self.tower):
            part.install(self.plan)

    def change(self, plan: Plan) -> None:
        """Undo `put_in_force`, and take another plan."""
        self._withdraw()
        self.plan, self.stats = plan, None

    def _withdraw(self) -> None:
        for part in (self._layers, self._tables, self.tower):
            part.remove()

    def remove(self) -> None:
        """Undo `install`; safe to call twice."""
        super().remove()
        self._weights.remove()
        self._withdraw()

    def is_off(self) -> bool:
        """Whether compression is off in this thread."""
        return self.calls.state.disabled > 0

    def compresses(self) -> bool:
        """Whether prompts with media are compressed in this thread."""
        return self.plan.active and self.calls.state.disabled == 0

    # -- before a call --------------------------------------------------------------------------

    def apart(self, module: nn.Module, args: Any, kwargs: Any) -> bool:
        """Whether a call that Dynamo traces is prepared between the graphs of a compiled model.

        Elsewhere there is nothing to do, or Dynamo traces what is done to the decoder. The call is
        one of the model, its body or its decoder.
        """
        if self.calls.state.modalities is not None:
            return True
        arguments = compat.bind(module, args, kwargs)
        return not self._later.traceable(arguments, self.plan.active)

    def _decoder(self, module: nn.Module, args: Any, kwargs: Any = None) -> Any:
        """A hook that Dynamo traces: it sets the mask of a step on a static cache."""
        if kwargs is None:  # see `tokencomp.torchlib.hooks`
            return None
        arguments, traced = compat.bind(module, args, kwargs), torch.compiler.is_compiling()
        if not traced or self.apart(module, args, kwargs):
            return self._enter(module, arguments, traced)
        return self._continue(arguments, compat.get_cache(arguments))

    def _continue(self, arguments: dict[str, Any], cache: Any) -> Any:
        """Arguments of later tokens; None where they stay as they are."""
        first = first_layer(cache)
        if not isinstance(first, CompressedLayer):
            return None
        arguments = dict(arguments)
        self._later.prepare(arguments, cache.layers, first)
        return (), arguments

    @compat.not_compiled
    def _enter(self, module: nn.Module, arguments: dict[str, Any], traced: bool) -> Any:
        """Arguments of a decoder call, whose layers then have the hooks that they need.

        `traced` says whether Dynamo has compiled the caller.
        """
        state, cache = self.calls.state, compat.get_cache(arguments)
        try:
            media = state.modalities is not None and state.modalities.numpy().any()
        except RuntimeError:  # of a tensor without values
            raise UnsupportedModelError(TRACED) from None
        if media:
            if torch.jit.is_tracing():
                raise UnsupportedModelError(TRACED)
            result = self._compress(module, arguments, cache, state)
        else:
            if not state.in_body and self.compresses() and begins_prompt(arguments):
                self._featureless.meet(arguments)  # the decoder was called on its own
            if self.tower.had_stage:
                self._refuse_missing(arguments)
            result = self._continue(arguments, cache)
        several = state.forward is not None and len(state.forward.segments) > 1
        if several or self.plan.layer_stages or self._layers.hooked:
            self._layers.prepare(several, traced)
        return result

    def _compress(
        self, module: nn.Module, arguments: dict[str, Any], cache: Any, state: CallState
    ) -> Any:
        """Read a prefill with visual tokens, and change its arguments by the entry stage."""
        if state.records:
            refuse_recomputation(self.adapter.body, "the places of its media")
        state.records = torch.is_grad_enabled()
        plan = self.plan.dropping if state.drops else self.plan
        if arguments.get("inputs_embeds") is None:
            arguments = with_embeddings(module, arguments)
        if plan.tower is None and self.tower.had_stage:
            self._refuse_missing(arguments)
        check_cache(cache, bool(plan.layer_stages))
        if isinstance(first := first_layer(cache), CompressedLayer):
            first.check_patch()
        arguments, mask, prepared = dict(arguments), arguments.get("attention_mask"), None
        if mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2):
            arguments, prepared = split_mask(arguments, cache, state.body_mask)
        forward, positions = read_prompt(self.adapter, arguments, cache, state, plan)
        state.forward, forward.prepared = forward, prepared
        if forward.merges:
            self._weights.begin()
        if self.tower.drop is not None or self.tower.probe is not None:
            self.tower.collect(forward, state.inputs or {})
        enter_prompt(forward, positions, arguments, self._owner.compact)
        whole = len(forward.segments) > 1 or not 0 < state.logits <= forward.tail
        if whole and "logits_to_keep" in arguments:
            # Decoders with shared keys (Gemma 4) cut their hidden states to these columns.
            arguments["logits_to_keep"] = 0
        if state.chunk is not None:
            arguments = self._prefill.advance(module, arguments, forward, state.logits)
        return (), arguments

    def _refuse_missing(self, arguments: dict[str, Any]) -> None:
        """Refuse features of a tower stage in a call whose plan, or lack of one, has none.

        NaN in features that this call has encoded itself is the model's own.
        """
        if arguments.get("inputs_embeds") is None:
            return
        state = self.calls.state
        if not (state.encodes or self.adapter.encodes(state.inputs or {})):
            refuse_missing(arguments["inputs_embeds"])

    # -- within and after a call ----------------------------------------------------------------

    def _true_positions(self, module: nn.Module, args: tuple[Any, ...], kwargs: Any) -> Any:
        """Arguments of a rotary module, with the original positions of the kept tokens."""
        state = self.calls.state
        forward: Any = state.forward
        if forward.rotary is None:
            return None
        if state.records:
            refuse_recomputation(self.adapter.decoder, "the positions of kept tokens")
        if "position_ids" in kwargs:
            return args, {**kwargs, "position_ids": forward.rotary}
        hidden, _, *rest = args
        return (hidden, forward.rotary, *rest), kwargs

    def _entered(self, module: nn.Module, args: Any, kwargs: Any) -> bool:
        return self.calls.state.forward is not None

    def _leave(self, module: nn.Module, args: Any, kwargs: Any, out: Any) -> Any:
        """The output of a decoder call with full length; None where it stays as it is."""
        state = self.calls.state
        forward, state.forward = state.forward, None
        if state.weighs:
            self._weights.end()
        several = forward is not None and len(forward.segments) > 1
        if several:
            self._layers.finish()
        if forward is None or out is None:
            return None
        if several:
            check_entered(forward.segments, module)
        cache = compat.get_cache(kwargs, out)
        if getattr(out, "attentions", None) is not None:
            out.attentions = restore_maps(out.attentions, forward, getattr(cache, "layers", ()))
        if not forward.compresses:
            extend_valid(forward, cache)
            return out
        if forward.merges:
            self._weights.check(forward)
        layer = compact_cache(forward, cache, self._owner)
        if forward.earlier:
            out = whole_output(out, forward.earlier)
        self.stats = stats = collect(forward, layer)
        self._missed.look(stats, forward.plan)
        text_only = 0 < state.logits <= forward.tail
        if text_only and "logits_to_keep" in kwargs:
            # Where a decoder may cut its last state, the model takes a short one as it is.
            out.last_hidden_state = out.last_hidden_state[:, -state.logits :]
        return restore_states(out, forward.segments, forward.width, text_only)
