"""Activation checkpointing: functions whose calls a backward pass runs again."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import FrameType

from torch import nn
from torch.utils.checkpoint import CheckpointFunction

# Attributes by which transformers and torch's CheckpointWrapper call checkpointing.
FUNCTIONS = ("_gradient_checkpointing_func", "checkpoint_fn")
_FILE = CheckpointFunction.forward.__code__.co_filename


def checkpoint_functions(root: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Yield every module of `root` that checkpoints something, with the name of its checkpoint
    function.
    """
    for module in root.modules():
        for name in FUNCTIONS:
            if name in vars(module):
                yield module, name


def checkpointed_since(module: nn.Module) -> bool:
    """Whether this code runs inside a checkpoint that began after `module` was called.

    Walks up the stack from here to the call of `module`, or of its `forward` alone.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename == _FILE:
            return True
        called = frame.f_code.co_name in ("_call_impl", "forward")
        if called and frame.f_locals.get("self") is module:
            return False
        frame = frame.f_back
    return False
