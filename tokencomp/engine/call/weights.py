"""Hands attention the weights of merged rows: how many tokens each of them stands for."""

from __future__ import annotations

from torch import Tensor
from transformers.cache_utils import StaticLayer

from tokencomp.adapters.base import Adapter
from tokencomp.engine.call.recomputed import Recomputation
from tokencomp.engine.call.state import CallHooks, RunningCalls
from tokencomp.engine.scores.proportional import ProportionalAttention
from tokencomp.plan.plan import Plan
from tokencomp.torchlib import compat


class RowWeights(CallHooks):
    """Gives attention the weights that the running call knows.

    Attributes
    ----------
    attention
        What widens queries and keys, while it is installed.
    """

    def __init__(self, adapter: Adapter, calls: RunningCalls) -> None:
        super().__init__(adapter, calls)
        self.attention = ProportionalAttention(adapter.layers, self._sizes)
        self._recomputation = Recomputation(calls)

    def install(self, plan: Plan) -> None:
        """Widen attention if `plan` merges; until `remove`, because caches remember the weights."""
        if plan.merges_rest:
            self.attention.install()

    def remove(self) -> None:
        """Undo `install`; safe to call twice."""
        super().remove()
        self.attention.remove()
        self._recomputation.remove()

    def prepare(self) -> None:
        """Let a prefill whose layers are checkpointed know its weights in the backward pass too."""
        if compat.recomputed(self.adapter.layers[0]):
            self._recomputation.prepare(self.adapter.layers)

    @compat.not_compiled
    def _sizes(self, layer: int, keys: int) -> Tensor | None:
        """How many tokens the first of `keys` rows of `layer` stand for in the call that runs now.

        A layer with a window hands the last of its rows to attention, and `sizes` begin with the
        first row of the sequence.
        """
        state = self.calls.running
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
