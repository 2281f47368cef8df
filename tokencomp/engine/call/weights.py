"""Hands attention the weights of merged rows: how many tokens each of them stands for.

The first pass of a checkpointed layer knows its call, and reads the weights there. When the
backward pass runs the layer once more, that call is over, and another one may have followed. So
what checkpoints a layer gets a function that brings its call along, if it is transformers or a
`CheckpointWrapper` of torch. Attention that is checkpointed in another way is refused.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tokencomp.adapters.base import Adapter
from tokencomp.engine.call.refusals import refuse_recomputation
from tokencomp.engine.call.state import CallHooks, RunningCalls
from tokencomp.engine.scores.proportional import (
    ProportionalAttention,
    attention_modules,
    extra_dims,
    reads_backend,
)
from tokencomp.engine.stage.forward import ForwardPass
from tokencomp.errors import MergeWarning, OptionError, UnsupportedModelError
from tokencomp.plan.plan import Plan
from tokencomp.torchlib import compat
from tokencomp.torchlib.checkpointing import checkpoint_functions
from tokencomp.torchlib.replace import MethodReplacement

MOST_DIMS = 256  # of a head, for FlashAttention


class RowWeights(CallHooks):
    """Gives attention the weights that the running prefill knows.

    Attributes
    ----------
    attention
        What widens queries and keys.
    """

    def __init__(self, adapter: Adapter, calls: RunningCalls) -> None:
        super().__init__(adapter, calls)
        self.attention = ProportionalAttention(adapter.layers, self._sizes)
        self._handles = []  # calls of several threads append to the same list, so it is made here

    def remove(self) -> None:
        """Undo everything; safe to call twice."""
        super().remove()
        self.attention.remove()

    def begin(self) -> None:
        """Widen attention for the prompt that runs in this thread, until `end`."""
        self.calls.state.weighs = True
        self.attention.enter()
        if torch.is_grad_enabled():
            # Before every prompt, as gradient_checkpointing_enable sets the functions again.
            for module, name in checkpoint_functions(self.adapter.decoder):
                if not MethodReplacement.replaces(getattr(module, name)):
                    replaced = MethodReplacement(module, name, self._checkpoint)
                    self._handles.append(replaced)

    def _checkpoint(
        self,
        original: Callable[..., Any],
        function: Callable[..., Any],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Checkpoint a layer, or a part of it, with a function that brings its call along.

        The patch may be gone when the backward pass runs the layer once more, so that this run
        widens attention by itself.
        """
        forward = self.calls.state.recomputed or self.calls.state.forward
        if forward is None or not forward.merges:
            return original(function, *args, **kwargs)

        def run(*args: Any, **kwargs: Any) -> Any:
            state = self.calls.state  # of the thread of the backward pass, in the second run
            before, state.recomputed = state.recomputed, forward
            self.attention.enter()
            try:
                return function(*args, **kwargs)
            finally:
                self.attention.leave()
                state.recomputed = before

        return original(run, *args, **kwargs)

    def check(self, forward: ForwardPass) -> None:
        """Refuse a prompt whose weights have not reached all of its attention.

        Raises
        ------
        UnsupportedModelError
            Attention of some layers does not call the function that its config names.
        """
        wanted = {module.layer_idx for module in attention_modules(self.adapter.layers)}
        missing = wanted - forward.weighed
        missing = {i for i in missing if forward.weights(forward.segment_of(i)) is not None}
        if missing:
            raise UnsupportedModelError(
                f"merge=True: the attention of layers {sorted(missing)} of "
                f"{type(self.adapter.decoder).__name__} has not asked for the weights of merged "
                "tokens, because it does not call the backend that its config names. Use "
                "merge=False."
            )

    def end(self) -> None:
        """Undo `begin` of this thread."""
        self.calls.state.weighs = False
        self.attention.leave()

    @compat.not_compiled
    def _sizes(self, layer: int, keys: int) -> Tensor | None:
        """How many tokens the first of `keys` rows of `layer` stand for in the running prefill.

        A layer with a window hands the last of its rows to attention, and `sizes` begin with the
        first row of the sequence.
        """
        state = self.calls.state
        forward = state.recomputed or state.forward
        if forward is None:
            return None
        segment = forward.segment_of(layer)
        forward.weighed.add(layer)
        sizes, rows = forward.weights(segment), segment.physical + segment.layout.width
        if sizes is not None and state.records and state.recomputed is None:
            # Without gradients is the first run of reentrant checkpointing, whoever implements it.
            first, lost = not torch.is_grad_enabled(), "the weights of merged tokens"
            refuse_recomputation(self.adapter.decoder, lost, ", or use merge=False", first)
        gone = rows - keys if forward.chunk is None else 0  # a chunk has the first rows alone
        return sizes if sizes is None or gone <= 0 else sizes[:, gone:]


def merging_where_possible(plan: Plan, adapter: Adapter, compact: bool) -> Plan:
    """The plan, whose stages with merge="auto" drop where the model or positions cannot merge well.

    A stage with merge=True is refused beside attention that weights do not reach, or compact
    positions. Where merge="auto" drops, a `MergeWarning` says why, once per model class.
    """
    asked = any(stage.merge is True for stage in plan.stages)
    try:
        modules = attention_modules(adapter.layers)
        if compact:
            raise OptionError(
                "merge=True with positions='compact': merged rows stand in the cache as often as "
                "the tokens that they stand for, and compact positions count rows. Use "
                "positions='original', or merge=False."
            )
        if not asked:
            _check_attention(modules)
    except (UnsupportedModelError, OptionError) as error:
        if asked:
            raise
        _warn_once(type(adapter.model).__qualname__, str(error))
        return plan.with_merge(False)
    return plan


@functools.cache
def _warn_once(model_class: str, reason: str) -> None:
    """Say once per model class and process that it cannot merge: every default `patch` asks."""
    warnings.warn(f"merge='auto' drops here. {reason}", MergeWarning, stacklevel=6)


def _check_attention(modules: list[Any]) -> None:
    """Refuse attention that certainly or possibly takes no weights.

    Raises
    ------
    UnsupportedModelError
        Attention computes everything by itself, or FlashAttention, which takes heads of at most 256
        dimensions, has no room for weights.
    """
    if deaf := sorted({type(m).__name__ for m in modules if not reads_backend(m)}):
        raise UnsupportedModelError(
            "merge=True: the weights of merged tokens do not reach the attention of "
            f"{' and '.join(deaf)}, which does not call the backend that its config names. Use "
            "merge=False."
        )
    dims = {int(getattr(module, "head_dim", 0)) for module in modules}
    if any(dim + extra_dims(dim) > MOST_DIMS for dim in dims):
        raise UnsupportedModelError(
            f"merge=True: heads of {max(dims)} dimensions have no room for weights under "
            f"FlashAttention, which takes {MOST_DIMS}. Use merge=False."
        )
