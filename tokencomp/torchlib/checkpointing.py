"""Activation checkpointing: a backward pass runs once more what ran within it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import FrameType

from torch import nn
from torch.utils.checkpoint import CheckpointFunction

# What transformers and torch's CheckpointWrapper call with the function to checkpoint.
FUNCTIONS = ("_gradient_checkpointing_func", "checkpoint_fn")
_FILE = CheckpointFunction.forward.__code__.co_filename


def checkpoint_functions(root: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Modules of `root` that checkpoint something, and the name of their function for it."""
    for module in root.modules():
        for name in FUNCTIONS:
            if name in vars(module):
                yield module, name


def checkpointed_since(module: nn.Module) -> bool:
    """Whether torch checkpoints something within the running call of `module`, around this code."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename == _FILE:
            return True
        if "_call_impl" in frame.f_code.co_name and frame.f_locals.get("self") is module:
            return False
        frame = frame.f_back
    return False
