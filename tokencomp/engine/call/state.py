"""What is known of the running call of every thread: the only place that holds it."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from tokencomp.engine.stage.forward import ForwardPass


@dataclass
class CallState:
    """What hooks note for one another during a call of the model.

    Attributes
    ----------
    columns
        From `generate`: columns of its prompt; None outside of it.
    encodes
        From `generate`: whether it encodes the media of the prompt itself.
    chunk
        From `generate`: columns per chunk of a chunked prefill; None: one pass.
    labels
        From the model: labels of a training call, or None.
    logits
        From the model: last columns whose logits the call returns; 0: all.
    drafts
        From the model: speculative tokens at the end of the call.
    inputs
        From the body: its arguments by name.
    kinds : Tensor of int8 on the CPU, shape (B, L), or None
        From the body: the kind of feature in every column, see `Adapter.kinds`.
    body_mask
        From the body: its `attention_mask`.
    forward
        From the decoder: its forward pass, where rows, masks or positions are not its own.
    cached
        From the decoder: the cache layers of a later token that needs no forward pass.
    recomputed
        The forward pass of the call whose layer runs now, where it is checkpointed.
    disabled
        How often this thread is inside of `Handle.disabled()`.
    """

    columns: int | None = None
    encodes: bool = False
    chunk: int | None = None
    labels: Tensor | None = None
    logits: int = 0
    drafts: int = 0
    inputs: dict[str, Any] | None = None
    kinds: Tensor | None = None
    body_mask: Any = None
    forward: ForwardPass | None = None
    cached: list[Any] | None = None
    recomputed: ForwardPass | None = None
    disabled: int = 0


_IDLE = CallState()  # of threads that have noted nothing yet; never written


class RunningCalls:
    """The call state of every thread that uses a patched model."""

    def __init__(self) -> None:
        self._local = threading.local()

    @property
    def running(self) -> CallState:
        """The state of this thread, to be read; Dynamo guards on what is read."""
        state: CallState = getattr(self._local, "state", _IDLE)
        return state

    @property
    def own(self) -> CallState:
        """The state of this thread, to be written. Dynamo cannot trace this."""
        if self.running is _IDLE:
            self._local.state = CallState()
        return self.running
