"""Exact positions in vLLM's model runner V2, which corrects them before the forward pass.

V2 hands the rows of media with their extra columns to `recompute_mrope_positions` of the model and
stores the positions that it returns, so `forward` needs no change and full CUDA graphs stay valid.
vLLM runs this step for models that prune by its own method. A model may choose the class of its
state in V2, and the class here adds the step without turning that method on.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import Tensor
from vllm.v1.worker.gpu.model_states.mm_pruning import MultiModalPruner


class FixedDelta:
    """A `RopeState` for the pruner whose positions change and whose deltas stay.

    The delta of the generated tokens follows from the full grids and is exact from the start. The
    corrected positions alone do not tell it if the prompt ends with media that lost their last row.
    """

    def __init__(self, state: Any) -> None:
        self._state = state

    def read_prefill_positions(self, req_idx: int, length: int) -> Tensor:
        """Return the positions (3, length) of a request."""
        return self._state.read_prefill_positions(req_idx, length)

    def update_prefill_positions(self, req_idx: int, positions: Tensor, delta: Any) -> None:
        """Store the positions (3, length) of a request; `delta` is not used."""
        own = int(self._state.prefill_delta.np[req_idx])
        self._state.update_prefill_positions(req_idx, positions, own)


@cache
def state_with_offsets(base: type) -> type:
    """Return a subclass of the V2 state `base` that corrects the positions of media rows."""

    class StateWithOffsets(base):
        """State of an M-RoPE model whose rows carry position offsets."""

        def __init__(self, vllm_config: Any, model: Any, encoder_cache: Any, device: Any) -> None:
            super().__init__(vllm_config, model, encoder_cache, device)
            if encoder_cache is not None:  # None if the engine was started for text only
                self.mm_pruner = MultiModalPruner(
                    model, FixedDelta(self.rope_state), encoder_cache, self.inputs_embeds_size
                )

    return StateWithOffsets
