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


class BasePositions:
    """A `RopeState` for the pruner that returns the positions with which a request came.

    The engine may rerun a part of a prompt, and offsets must not be added twice. Positions outside
    the part that runs now are not used, so those written back may lack the offsets of other parts.
    """

    def __init__(self, state: Any) -> None:
        self._state = state
        self._base: dict[int, Tensor] = {}  # by the request's index in the engine

    def forget(self, req_idx: int) -> None:
        """Note that another request has this index from now on."""
        self._base.pop(req_idx, None)

    def read_prefill_positions(self, req_idx: int, length: int) -> Tensor:
        """Return the positions (3, length) of a request without offsets."""
        if req_idx not in self._base:
            self._base[req_idx] = self._state.read_prefill_positions(req_idx, length).clone()
        return self._base[req_idx]

    def update_prefill_positions(self, req_idx: int, positions: Tensor, delta: Any) -> None:
        """Store the positions (3, length) of a request, with the exact delta from the full grids.

        vLLM's `delta` is wrong if the prompt ends with media that lost their last row.
        """
        own = int(self._state.prefill_delta.np[req_idx])
        self._state.update_prefill_positions(req_idx, positions, own)


@cache
def state_with_offsets(base: type) -> type:

    class StateWithOffsets(base):
        """State of an M-RoPE model whose rows carry position offsets."""

        def __init__(self, vllm_config: Any, model: Any, encoder_cache: Any, device: Any) -> None:
            super().__init__(vllm_config, model, encoder_cache, device)
            self._base_positions = BasePositions(self.rope_state)
            if encoder_cache is not None:  # None if the engine was started for text only
                self.mm_pruner = MultiModalPruner(
                    model, self._base_positions, encoder_cache, self.inputs_embeds_size
                )

        def add_request(self, req_index: int, new_req_data: Any) -> None:
            """Store what a request needs; its index may have belonged to another one."""
            super().add_request(req_index, new_req_data)
            self._base_positions.forget(req_index)

    return StateWithOffsets
