"""Hooks on decoder layers and their attention, which are there only while a call needs them."""

from __future__ import annotations

import functools
import threading
from typing import Any

from torch import Tensor, nn

from tokencomp.adapters.base import Adapter
from tokencomp.engine.call.state import RunningCalls
from tokencomp.engine.kinds.windows import Windows
from tokencomp.engine.scores.layer_stages import scored_before, scored_layer
from tokencomp.engine.scores.tap import attention_of
from tokencomp.errors import copy_error
from tokencomp.plan.plan import Plan
from tokencomp.tokens.signals import Attention
from tokencomp.torchlib import compat
from tokencomp.torchlib.replace import Hooked


class LayerHooks(Hooked):
    """Installs the hooks of the layers for calls whose layers hold different rows.

    These are prompts with stages between layers, and later tokens whose masks differ by layer. A
    decode step without padding is not among them: it removes the hooks, so that it runs no Python
    function of ours per layer or stage, and the steps behind it find none. A call that needs them
    registers them in some microseconds per layer, before the decoder reaches its first layer.

    Threads share the modules. The hooks therefore stay while any thread is in a call that needs
    them; in the calls of other threads they return at once. Dynamo does not look whether hooks
    have come or gone since it compiled a layer, so that once the model is compiled they are there
    for good.

    Parameters
    ----------
    calls
        The forward pass of every thread.
    """

    def __init__(self, adapter: Adapter, calls: RunningCalls) -> None:
        self.adapter, self.calls = adapter, calls
        self._staged = self._compiled = False
        self._scored: list[tuple[nn.Module, int, Attention]] = []  # attention, stage, signal
        self._users: dict[int, threading.Thread] = {}
        self._lock = threading.Lock()

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise copy_error(type(self.adapter.model).__name__)

    def install(self, plan: Plan) -> None:
        """Serve the calls of this plan.

        Raises
        ------
        UnsupportedModelError
            Tokens would be scored by a layer that has no attention.
        """
        windows, layers = Windows.of(self.adapter.decoder), self.adapter.layers
        self._staged = bool(plan.layer_stages)
        for stage in plan.layer_stages:
            for signal in stage.reducer.needs if stage.most > 0 else ():
                if isinstance(signal, Attention) and scored_before(
                    signal, self.adapter, stage.layer
                ):
                    attn = attention_of(layers[scored_layer(windows, plan, stage.layer)])
                    self._scored.append((attn, stage.layer, signal))

    def remove(self) -> None:
        """Undo `install`, and remove all hooks; safe to call twice."""
        with self._lock:
            self._staged = False
            self._scored.clear()
            self._users.clear()
            super().remove()

    def prepare(self, needed: bool, traced: bool) -> None:
        """Install or remove the hooks before the decoder runs, as this call needs.

        Parameters
        ----------
        needed
            Whether rows or masks differ by layer in this call.
        traced
            Whether Dynamo has compiled the caller.
        """
        if not (needed or self._staged or self._handles):
            return
        self._compiled = self._compiled or traced or compat.layers_compiled(self.adapter.decoder)
        if needed or (self._staged and self._compiled):
            with self._lock:
                if needed:
                    self._users[threading.get_ident()] = threading.current_thread()
                if not self._handles:
                    self._hook()
        elif self._handles and not self._compiled:
            self._leave()

    def finish(self) -> None:
        """Note that the call of this thread no longer needs the hooks."""
        self._users.pop(threading.get_ident(), None)

    def _leave(self) -> None:
        """Remove the hooks, unless another thread is in a call that needs them."""
        with self._lock:
            self._users.pop(threading.get_ident(), None)  # left over from an interrupted call
            if not any(thread.is_alive() for thread in list(self._users.values())):
                super().remove()

    def _hook(self) -> None:
        for i, layer in enumerate(self.adapter.layers):
            hook = functools.partial(self._layer, i)
            # Before the hooks of others, which then see the rows that the layer gets.
            handle = layer.register_forward_pre_hook(hook, with_kwargs=True, prepend=True)
            self._handles.append(handle)
        for attn, stage, signal in self._scored:
            query = getattr(attn, "q_proj", None)
            if signal.rows == "all" and isinstance(query, nn.Module):
                note = functools.partial(self._projected, stage)
                self._handles.append(query.register_forward_hook(note))
            score = functools.partial(self._attention, stage, signal)
            self._handles.append(attn.register_forward_hook(score, with_kwargs=True))

    # A thread may reach a module just while another one registers or removes its hook. torch then
    # calls the hook without keyword arguments; that thread's own call does not need it.

    def _layer(self, i: int, module: nn.Module, args: Any, kwargs: Any = None) -> Any:
        if kwargs is None or self.calls.running.forward is None:
            return None
        return self._arguments(i, args, kwargs)

    @compat.not_compiled
    def _arguments(self, i: int, args: Any, kwargs: dict[str, Any]) -> Any:
        forward: Any = self.calls.running.forward  # set, as the caller has seen
        return forward.before_layer(i, args, kwargs)

    def _attention(self, stage: int, signal: Any, module: nn.Module, args: Any, *rest: Any) -> None:
        if len(rest) == 2 and self.calls.running.forward is not None:
            self._score(stage, signal, module, args, rest[0])

    @compat.not_compiled
    def _score(self, stage: int, signal: Any, module: nn.Module, args: Any, kwargs: Any) -> None:
        forward: Any = self.calls.running.forward  # set, as the caller has seen
        if forward.compresses:
            forward.score(stage, module, compat.bind(module, args, kwargs), signal)

    def _projected(self, stage: int, module: nn.Module, args: Any, out: Any) -> None:
        if self.calls.running.forward is not None:
            self._note(stage, out)

    @compat.not_compiled
    def _note(self, stage: int, projected: Any) -> None:
        forward: Any = self.calls.running.forward  # set, as the caller has seen
        if forward.compresses and isinstance(projected, Tensor) and projected.ndim == 3:
            forward.projected[stage] = projected.detach()
