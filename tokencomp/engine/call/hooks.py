"""The hooks of a patched model: what is installed, when, and what they note of a call.

top
    Notes `labels` and `logits_to_keep`, which say whether the output must have full length.
body
    Notes where visual placeholders are, if the call carries visual features.
decoder
    Compresses, see `tokencomp.engine.call.decoder`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tokencomp.adapters.base import Adapter
from tokencomp.adapters.registry import DATA_PARALLEL
from tokencomp.adapters.structure import parameters_of
from tokencomp.engine.cache.owner import CacheOwner
from tokencomp.engine.call.chunks import ChunkedPrefill
from tokencomp.engine.call.decoder import DecoderHooks
from tokencomp.engine.call.gate import CallGate
from tokencomp.engine.call.generate import GenerateCalls, with_types
from tokencomp.engine.call.later import begins_prompt
from tokencomp.engine.call.refusals import FeaturelessPrompts, refuse_recomputation
from tokencomp.engine.call.state import CallHooks, RunningCalls
from tokencomp.engine.count.stats import Stats
from tokencomp.engine.layer_types.relative import RelativePositions
from tokencomp.engine.layer_types.types import LayerTypes
from tokencomp.errors import UnsupportedModelError
from tokencomp.plan.plan import Plan
from tokencomp.torchlib import compat
from tokencomp.torchlib.hooks import forget_compiled
from tokencomp.torchlib.replace import MethodReplacement


class Hooks(CallHooks):
    """Installs and removes the hooks of one patched model.

    What belongs to a running call lives in thread-local storage; `stats` is shared: the counts of
    the prefill that ended last, in whichever thread. Dynamo cannot trace what the hooks do, so they
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
        LayerTypes.of(adapter.decoder)  # refuses layer types that are not known
        super().__init__(adapter, RunningCalls())
        calls, self.compact_positions = self.calls, compact_positions
        self.gate = CallGate.of(adapter.model)
        self._owner, self._compressed = CacheOwner(compact_positions), False
        prefill = ChunkedPrefill(adapter, calls, self._compresses)
        self._featureless = FeaturelessPrompts(adapter, strict)
        known = self._owner, prefill, self._featureless
        self.decoder = DecoderHooks(adapter, calls, plan, *known)
        generate = GenerateCalls(adapter, self.gate, calls, self._compresses, strict)
        relative = RelativePositions(adapter, calls)
        self._parts: list[Any] = [self.decoder, relative, prefill, generate]
        # The thinkers of Qwen-Omni swallow the argument and return all logits.
        self._slices = "logits_to_keep" in parameters_of(adapter.top)

    # -- installation ---------------------------------------------------------------------------

    def install(self) -> None:
        """Put the plan in force; no call may be running."""
        if self._needed():
            self._hook()

    def change(self, plan: Plan) -> None:
        """Put another plan in force; no call may be running."""
        self.decoder.change(plan)
        if not self._needed():
            self.remove()
        elif self._handles:
            self.decoder.put_in_force()
        else:
            self._hook()

    def _needed(self) -> bool:
        """Whether anything must be done to calls: to prompts, or to what earlier plans have left.

        Those are caches that this patch has compressed, and features with tokens missing.
        """
        self._compressed |= self.plan.active
        return self._compressed or self.decoder.tower.had_stage

    def _hook(self) -> None:
        top, body, apart = self.adapter.top, self.adapter.body, self.decoder.apart
        for module in dict.fromkeys((top, body)):
            self._count_calls(module)
        self._before(top, self._note_call, self._is_original)
        self._after(top, self._forget_call, traced=apart, always_call=True)
        self._before(body, self._note_prompt, traced=apart)
        self._after(body, self._forget_prompt, traced=apart, always_call=True)
        for part in (*self._parts, self.adapter):
            part.install()
        forget_compiled()
        self._owner.active = True

    def remove(self) -> None:
        """Undo `install`, while no call is running; safe to call twice."""
        if not self._handles:
            return
        self._owner.active = False
        super().remove()
        for part in reversed(self._parts):
            part.remove()
        self.adapter.uninstall()
        forget_compiled()

    # -- running calls --------------------------------------------------------------------------

    def _count_calls(self, module: nn.Module) -> None:
        """Count the calls of a module, and send a direct call of its `forward` through its hooks.

        torch runs hooks for `module(...)` alone. A hook notes that it has run, so a `forward`
        without such a note is a direct call. None of this is traced by Dynamo.
        """
        self._handles += [
            module.register_forward_pre_hook(self._begin),
            module.register_forward_hook(self._end, always_call=True),
            MethodReplacement(module, "forward", functools.partial(self._forward, module)),
        ]

    def _begin(self, module: nn.Module, args: Any) -> None:
        if not torch.compiler.is_compiling():
            self.calls.state.called.add(id(module))

    def _end(self, module: nn.Module, args: Any, out: Any) -> None:
        if not torch.compiler.is_compiling():
            self.calls.state.called.discard(id(module))

    def _forward(
        self, module: nn.Module, original: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        if torch.compiler.is_compiling():
            return original(*args, **kwargs)
        called = self.calls.state.called
        if id(module) not in called:
            return module(*args, **kwargs)
        called.discard(id(module))
        with self.gate.call():
            return original(*args, **kwargs)

    # -- state ----------------------------------------------------------------------------------

    @property
    def plan(self) -> Plan:
        """The plan in force."""
        return self.decoder.plan

    @property
    def stats(self) -> Stats | None:
        """Counts of the compressed prefill that ended last; None where there are none."""
        return self.decoder.stats

    @property
    def disabled(self) -> bool:
        """Whether compression is off in this thread."""
        return self.decoder.is_off()

    def disable(self, by: int) -> None:
        """Count calls of `Handle.disabled()` in this thread up or down."""
        self.calls.state.disabled += by

    def drop(self, drops: bool) -> None:
        """Whether prompts of this thread drop what their plan would merge."""
        self.calls.state.drops = drops

    def _compresses(self) -> bool:
        return self.decoder.compresses()

    # -- top and body ---------------------------------------------------------------------------

    def _is_original(self, module: nn.Module, args: Any, kwargs: Any) -> bool:
        """Refuse copies of the model, and say whether its call is prepared between graphs."""
        if getattr(module, "_is_replica", False):  # DataParallel has made it
            raise UnsupportedModelError(DATA_PARALLEL)
        return not torch.compiler.is_compiling() or self.decoder.apart(module, args, kwargs)

    def _note_call(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Note the labels, and which logits the call must return."""
        arguments, state = compat.bind(module, args, kwargs), self.calls.state
        keep, labels = arguments.get("logits_to_keep", 0), arguments.get("labels")
        if labels is not None or not isinstance(keep, int):
            keep = 0
        state.records = torch.is_grad_enabled()
        state.labels, state.logits = labels, keep if self._slices else 0
        state.drafts = max(keep - 1, 0)  # assisted decoding: speculative tokens at the end

    def _forget_call(self, *call: Any) -> None:
        state = self.calls.state
        state.labels, state.logits, state.drafts = None, 0, 0

    def _note_prompt(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Note where the visual features of a call go."""
        arguments, state = compat.bind(module, args, kwargs), self.calls.state
        state.in_body, state.body_mask = True, arguments.get("attention_mask")
        state.forward = None
        state.inputs = state.modalities = None
        if not self.decoder.compresses():
            state.inputs = arguments
            return
        if state.types is not None:
            arguments = with_types(arguments, state.types)
        modalities = self.adapter.modalities(arguments)
        if modalities is not None:
            noted = state.labels is not None or state.drafts  # they say where the question ends
            if state.records and noted:
                refuse_recomputation(self.adapter.top, "its labels")
            state.records = torch.is_grad_enabled()
            state.inputs, state.modalities = arguments, modalities.cpu()
        elif begins_prompt(arguments):
            self.decoder.stats = None  # not those of another prompt
            self._featureless.meet(arguments)

    def _forget_prompt(self, *call: Any) -> None:
        state = self.calls.state
        state.modalities = state.inputs = state.forward = state.body_mask = None
        state.in_body = False
