"""What is known of the running call of every thread: the only place that holds it."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from tokencomp.adapters.base import Adapter
from tokencomp.engine.stage.forward import ForwardPass
from tokencomp.errors import copy_error
from tokencomp.torchlib.hooks import Hooked


@dataclass
class CallState:
    """What hooks note for one another during a call of the model.

    Attributes
    ----------
    columns
        From `generate`: columns of its prompt; None outside of it.
    encodes
        From `generate`: whether it encodes the media of the prompt itself.
    types : Tensor of int, shape (B, L), or None
        From `generate`: kinds of features in `inputs_embeds`, where the model itself takes none.
    chunk
        From `generate`: columns per chunk of a chunked prefill; None: one pass.
    labels
        From the model: labels of a training call, or None.
    logits
        From the model: last columns whose logits the call returns; 0: all.
    drafts
        From the model: speculative tokens at the end of the call.
    records
        From the model, then the body, then the decoder: whether its call began with gradients.
    in_body
        From the body: whether it is running.
    inputs
        From the body: its arguments by name.
    modalities : Tensor of int8 on the CPU, shape (B, L), or None
        From the body: the kind of feature in every column, see `Adapter.modalities`.
    body_mask
        From the body: its `attention_mask`.
    forward
        From the decoder: its forward pass, where rows, masks or positions are not its own.
    recomputed
        The forward pass of the call whose layer runs now, where it is checkpointed.
    weighs
        Whether attention is widened for a prompt of this thread.
    disabled
        How often this thread is inside of `Handle.disabled()`.
    drops
        From a session with a budget: whether all that does not stay is dropped.
    called
        Modules whose hooks have begun a call that their `forward` has not.
    """

    columns: int | None = None
    encodes: bool = False
    types: Tensor | None = None
    chunk: int | None = None
    labels: Tensor | None = None
    logits: int = 0
    drafts: int = 0
    records: bool = False
    in_body: bool = False
    inputs: dict[str, Any] | None = None
    modalities: Tensor | None = None
    body_mask: Any = None
    forward: ForwardPass | None = None
    recomputed: ForwardPass | None = None
    weighs: bool = False
    disabled: int = 0
    drops: bool = False
    called: set[int] = field(default_factory=set)


class RunningCalls(threading.local):
    """The call state of every thread that uses a patched model; each thread has its own `state`.

    Nothing of the class itself is called `state`, so that Dynamo reads and guards that of the
    thread.
    """

    def __init__(self) -> None:
        self.state = CallState()


class CallHooks(Hooked):
    """Hooks that read what is known of the running call.

    Parameters
    ----------
    calls
        The call state of every thread.
    """

    def __init__(self, adapter: Adapter, calls: RunningCalls) -> None:
        self.adapter, self.calls = adapter, calls

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise copy_error(type(self.adapter.model).__name__)

    def _has_forward(self, module: nn.Module, args: Any, kwargs: Any) -> bool:
        """Whether the decoder is in a call whose rows, masks or positions are not its own."""
        return self.calls.state.forward is not None
