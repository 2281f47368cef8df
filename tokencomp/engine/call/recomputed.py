"""Weights of merged tokens in checkpointed layers, which the backward pass runs once more.

The first pass of a layer knows its call, and reads the weights there. When the backward pass runs
the layer again, that call is over, and another one may have followed. So what checkpoints a layer
gets a function that brings its call along.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from tokencomp.engine.call.state import RunningCalls

FUNCTION = "_gradient_checkpointing_func"  # transformers calls it with a layer's forward


class Carrying:
    """What checkpoints a layer under a patch, in place of `original`."""

    def __init__(self, original: Callable[..., Any], calls: RunningCalls) -> None:
        self.original, self.calls = original, calls

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        forward = self.calls.running.forward
        if forward is None:
            return self.original(function, *args, **kwargs)

        def run(*args: Any) -> Any:
            state = self.calls.own  # of the thread of the backward pass, in the second run
            before, state.recomputed = state.recomputed, forward
            try:
                return function(*args)
            finally:
                state.recomputed = before

        return self.original(run, *args, **kwargs)


class Recomputation:
    """Lets the checkpointed layers of a model carry their calls."""

    def __init__(self, calls: RunningCalls) -> None:
        self.calls = calls
        self._layers: list[Any] = []

    def prepare(self, layers: Iterable[nn.Module]) -> None:
        """Replace what checkpoints the layers, before they run.

        Every `gradient_checkpointing_enable` sets it again.
        """
        for layer in layers:
            original = getattr(layer, FUNCTION)
            if not isinstance(original, Carrying):
                setattr(layer, FUNCTION, Carrying(original, self.calls))
                self._layers.append(layer)

    def remove(self) -> None:
        """Undo `prepare`; safe to call twice."""
        for layer in self._layers:
            own = getattr(layer, FUNCTION, None)
            if isinstance(own, Carrying):
                setattr(layer, FUNCTION, own.original)
        self._layers.clear()
