"""Hooks inside of the decoder that depend on the plan: on layers, attention and rotary tables."""

from __future__ import annotations

import functools
import threading
from typing import Any

from torch import Tensor, nn

from tokencomp.adapters.base import Adapter
from tokencomp.engine.call.layer_stages import scored_stages
from tokencomp.engine.call.refusals import refuse_recomputation
from tokencomp.engine.call.state import CallHooks, RunningCalls
from tokencomp.engine.scores.capture import attention_of
from tokencomp.engine.stage.layer_calls import before_layer
from tokencomp.plan.plan import Plan
from tokencomp.tokens.signals import Attention
from tokencomp.torchlib import compat
from tokencomp.torchlib.replace import MethodReplacement


class LayerHooks(CallHooks):
    """Installs the hooks of the layers for calls whose layers hold different rows.

    These are prompts with stages between layers, and later tokens whose masks differ by layer. A
    decode step without padding is not among them: it removes the hooks, so that it runs no Python
    function of ours per layer or stage, and the steps behind it find none. A call that needs them
    registers them in some microseconds per layer, before the decoder reaches its first layer.

    Threads share the modules. The hooks therefore stay while any thread is in a call that needs
    them; in the calls of other threads they return at once. Dynamo does not look whether hooks
    have come or gone since it compiled a layer, so that once the model is compiled they are there
    for good.

    Attributes
    ----------
    hooked
        Whether the hooks are there.
    """

    def __init__(self, adapter: Adapter, calls: RunningCalls) -> None:
        super().__init__(adapter, calls)
        self._staged = self._compiled = self.hooked = False
        self._scored: list[tuple[nn.Module, int, Attention]] = []  # attention, stage, signal
        self._users: dict[int, threading.Thread] = {}
        self._lock = threading.Lock()

    def install(self, plan: Plan) -> None:
        """Serve the calls of this plan."""
        self._staged = bool(plan.layer_stages)
        for stage, layer, signal in scored_stages(plan, self.adapter):
            self._scored.append((attention_of(self.adapter.layers[layer]), stage, signal))

    def remove(self) -> None:
        """Undo `install`, and remove all hooks; safe to call twice."""
        with self._lock:
            self._staged = False
            self._scored.clear()
            self._users.clear()
            self._unhook()

    def prepare(self, needed: bool, traced: bool) -> None:
        """Install or remove the hooks before the decoder runs.

        They are `needed` where rows or masks differ by layer in this call; `traced` says whether
        Dynamo has compiled the caller.
        """
        self._compiled = self._compiled or traced or compat.layers_compiled(self.adapter.decoder)
        if needed or (self._staged and self._compiled):
            with self._lock:
                if needed:
                    self._users[threading.get_ident()] = threading.current_thread()
                if not self.hooked:
                    self._hook()
        elif self.hooked and not self._compiled:
            self._leave()

    def finish(self) -> None:
        """Note that the call of this thread no longer needs the hooks."""
        self._users.pop(threading.get_ident(), None)

    def _leave(self) -> None:
        """Remove the hooks, unless another thread is in a call that needs them."""
        with self._lock:
            self._users.pop(threading.get_ident(), None)  # left over from an interrupted call
            if not any(thread.is_alive() for thread in list(self._users.values())):
                self._unhook()

    def _unhook(self) -> None:
        self.hooked = False
        super().remove()

    def _hook(self) -> None:
        self.hooked = True
        for i, layer in enumerate(self.adapter.layers):
            # Before the hooks of others, which then see the rows that the layer gets.
            run = functools.partial(self._layer, i)
            self._before(layer, run, self._has_forward, prepend=True)
        for attn, stage, signal in self._scored:
            query = getattr(attn, "q_proj", None)
            if signal.rows == "all" and isinstance(query, nn.Module):
                note = functools.partial(self._note, stage, attn)
                self._after(query, note, self._has_forward)
            score = functools.partial(self._score, stage, signal)
            # Before FSDP2's, which shards the weights of `attn` once it has run.
            self._after(attn, score, self._has_forward, prepend=True)

    def _layer(self, i: int, module: nn.Module, args: Any, kwargs: Any) -> Any:
        state = self.calls.state
        forward: Any = state.forward
        if state.records and forward.segment_of(i).first:
            refuse_recomputation(self.adapter.decoder, "the stages between layers")
        return before_layer(forward, i, args, kwargs)

    def _score(self, stage: int, signal: Any, module: nn.Module, args: Any, *rest: Any) -> None:
        forward: Any = self.calls.state.forward
        if forward.compresses:
            arguments = compat.bind(module, args, rest[0])
            with forward.timed():
                forward.scores.of_call(stage, module, arguments, signal, forward.layout)

    def _note(
        self, stage: int, attn: Any, module: nn.Module, args: Any, kwargs: Any, out: Any
    ) -> None:
        forward: Any = self.calls.state.forward
        own = attn.q_proj is module  # PEFT puts a LoRA around it, whose part `out` has not
        if own and forward.compresses and isinstance(out, Tensor) and out.ndim == 3:
            forward.scores.projected[stage] = out.detach()


class SharedTables(CallHooks):
    """Gives the decoder the rotary tables with which the entry stage has scored the prompt.

    An entry of a table depends on its own position alone, so that the columns which are left of
    these tables equal what the decoder would compute anew. No hook can leave a call out. Therefore
    `forward` of the rotary module is replaced, and only under plans that score tokens at entry.
    """

    def install(self, plan: Plan) -> None:
        """Replace `forward`, if the entry stage of `plan` computes tables."""
        needs = plan.entry.needs if plan.entry is not None else ()
        if self.adapter.rotary is not None and any(isinstance(s, Attention) for s in needs):
            replaced = MethodReplacement(self.adapter.rotary, "forward", self._forward)
            self._handles.append(replaced)

    def _forward(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        tables = None
        if self.calls.state.forward is not None:
            tables = self._tables(args, kwargs)
        return original(*args, **kwargs) if tables is None else tables

    @compat.not_compiled
    def _tables(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The tables of the entry stage; None if the call asks for others, as a chunk does."""
        forward: Any = self.calls.state.forward  # set, as the caller has seen
        arguments = compat.bind(self.adapter.rotary, args, kwargs)
        positions = arguments.get("position_ids")
        if positions is None or positions.shape[-1] != forward.layout.width:
            return None
        return forward.tables.get(arguments.get("layer_type"))
