"""What is known inside of `model.generate`, and to its caller alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from tokencomp.adapters.base import Adapter
from tokencomp.engine.call.gate import CallGate
from tokencomp.engine.call.state import RunningCalls
from tokencomp.torchlib.hooks import Hooked
from tokencomp.torchlib.replace import MethodReplacement

GENERATE = "generate"


class GenerateCall(Hooked):
    """Notes what the running `generate` was called with.

    `generate` calls the model with the prompt and whatever it has drafted or generated since; only
    its caller knows where one ends and the other begins. It encodes media before it calls the
    model, so for the gate it is one call: features of one setting must not meet the plan of
    another. A patched model therefore carries a `generate` of its own that calls the original.
    """

    def __init__(self, adapter: Adapter, gate: CallGate, calls: RunningCalls) -> None:
        self.adapter, self.gate, self.calls = adapter, gate, calls

    def install(self) -> None:
        """Replace `model.generate`, if the model has it."""
        self._handles.append(MethodReplacement(self.adapter.top, GENERATE, self._generate))

    def _generate(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        state, name = self.calls.own, id(kwargs)
        earlier = state.columns, state.encodes
        self.gate.enter(name)
        state.columns, state.encodes = prompt_columns(args, kwargs), self.adapter.encodes(kwargs)
        try:
            return original(*args, **kwargs)
        finally:
            state.columns, state.encodes = earlier
            self.gate.leave(name)


def prompt_columns(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int | None:
    """Columns of the prompt that `generate` was called with, or None if they do not show it."""
    for name in ("inputs_embeds", "input_ids", "inputs"):
        if isinstance(kwargs.get(name), Tensor):
            return int(kwargs[name].shape[1])
    return int(args[0].shape[1]) if args and isinstance(args[0], Tensor) else None
