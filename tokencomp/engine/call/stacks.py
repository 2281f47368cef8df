"""Calls of a model that no hook has counted, found on the stacks of the threads.

A patch that compresses nothing installs no hooks. When its plan changes, calls may be running that
began without them. Only the stacks of their threads show these calls.
"""

from __future__ import annotations

import gc
import sys
import threading
from collections.abc import Collection, Iterator
from types import FrameType

from torch import nn

BODIES = ("forward", "generate")  # parts of the names of functions that are the call itself
CALLS = (*BODIES, "_call_impl")  # and of torch's, which has read the hooks before it runs one

_READING = threading.Lock()


def threads_in(modules: Collection[nn.Module]) -> set[int]:
    """Ids of the other threads that are in a call of one of these modules."""
    own, frames = threading.get_ident(), _frames()
    return {i for i, frame in frames.items() if i != own and _calls(frame, modules, CALLS)}


def in_running_call(modules: Collection[nn.Module]) -> bool:
    """Whether this thread is within a call of one of these modules that has run its hooks."""
    return _calls(sys._getframe(1), modules, BODIES)


def _frames() -> dict[int, FrameType]:
    """The frames of all threads, read while no garbage is collected.

    Python 3.11 and older hold a lock of the interpreter meanwhile. A collection that begins here
    may run a finalizer that wants the same lock, and the process would wait forever.
    """
    with _READING:
        enabled = gc.isenabled()
        gc.disable()
        try:
            return sys._current_frames()
        finally:
            if enabled:
                gc.enable()


def _calls(frame: FrameType, modules: Collection[nn.Module], names: Collection[str]) -> bool:
    """Whether a stack has a function of one of these names whose `self` is one of the modules."""
    for function in _stack(frame):
        if any(name in function.f_code.co_name for name in names):
            owner = function.f_locals.get("self")
            if any(owner is module for module in modules):
                return True
    return False


def _stack(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back
