"""Calls of a patched model run side by side; a change of its patch waits until none is running."""

from __future__ import annotations

import contextlib
import functools
import gc
import sys
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager
from types import FrameType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from tokencomp.errors import copy_error
from tokencomp.torchlib.hooks import Hooked
from tokencomp.torchlib.replace import MethodReplacement

_CHANGES: WeakKeyDictionary[nn.Module, AbstractContextManager[Any]] = WeakKeyDictionary()
BODIES = ("forward", "generate")  # parts of the names of functions that are the call itself
CALLS = (*BODIES, "_call_impl")  # and of torch's, which has read the hooks before it runs one
_READING, _ADDING = threading.Lock(), threading.Lock()
POLL_SECONDS = 0.01  # how often a waiting change looks at the threads that it waits for


def changes(model: nn.Module) -> AbstractContextManager[Any]:
    """A lock for every change of the patch of `model`, which one thread may take several times.

    A gate belongs to one patch. Where several threads patch one model, a patch replaces the one of
    another thread, and all of that is one change.
    """
    with _ADDING:
        return _CHANGES.setdefault(model, threading.RLock())


class CallGate(Hooked):
    """Knows which threads are in a call, and lets one thread at a time change what calls read.

    A thread that has died, or the thread that makes the change, never blocks it. Calls are counted
    by hooks, which a change installs first, so that no call can begin while it waits. Calls that
    began before are found on the stacks of their threads, and wait for nobody.

    torch runs hooks for `module(...)` alone, so a direct call of `module.forward(...)` is sent
    through it. Longer calls (`generate`) enter and leave by themselves.

    Parameters
    ----------
    modules
        The model and its body, whose calls are counted; they may call each other.
    """

    def __init__(self, *modules: nn.Module) -> None:
        self._modules = tuple(dict.fromkeys(modules))
        self._condition = threading.Condition()
        self._calls: dict[int, tuple[threading.Thread, list[int]]] = {}
        self._waiting: set[int] = set()  # threads whose calls wait for the change
        self._changing: int | None = None
        self._uncounted = False  # whether calls may be running that began before `install`

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise copy_error(type(self._modules[0]).__name__)

    @property
    def installed(self) -> bool:
        """Whether calls are counted."""
        return bool(self._handles)

    def install(self) -> None:
        """Count calls from here on; safe to call twice."""
        if self._handles:
            return
        self._uncounted = True
        for module in self._modules:
            enter = module.register_forward_pre_hook(self.enter)
            leave = module.register_forward_hook(self.leave, always_call=True)
            direct = functools.partial(self._forward, module)
            self._handles += [enter, leave, MethodReplacement(module, "forward", direct)]

    def remove(self) -> None:
        """Undo `install`; safe to call twice."""
        super().remove()
        with self._condition:
            self._calls.clear()  # the hooks that would end them are gone

    def busy(self) -> bool:
        """Whether this thread is in a counted call, `generate` included."""
        return threading.get_ident() in self._calls

    def _forward(
        self, module: nn.Module, original: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """`module.forward`: what `module(...)` runs between its hooks, or a call of its own."""
        if torch.compiler.is_compiling():
            return original(*args, **kwargs)
        _, names = self._calls.get(threading.get_ident(), (None, []))
        if id(module) not in names:
            self.enter(module)  # Dynamo may skip the hook that enters, but not this function
            try:
                return module(*args, **kwargs)
            finally:
                self.leave(module)
        try:
            return original(*args, **kwargs)
        except Exception:
            raise  # torch still runs the hook that ends the call
        except BaseException:  # not after an interrupt from the keyboard
            self.leave(module)
            raise

    def enter(self, call: object, args: Any = None) -> None:
        """Note that a call begins in this thread; wait while another thread makes a change.

        `call` is the module of which this is a hook, or any object that only this call has, and
        `args` are what torch hands a hook.
        """
        if args is not None and torch.compiler.is_compiling():  # the hook alone may be traced
            return
        own, name = threading.get_ident(), id(call)
        with self._condition:
            _, names = self._calls.get(own, (None, []))
            if not names and self._changing not in (None, own):
                self._wait(own)
            # A name that is there already is left over from a call that was interrupted.
            names = [*names[: names.index(name)], name] if name in names else [*names, name]
            self._calls[own] = threading.current_thread(), names
        if args is not None and not self._handles:  # the patch has gone while this call has waited
            self.leave(call)

    def _wait(self, own: int) -> None:
        """Wait while another thread makes a change, unless it waits for this thread."""
        if self._uncounted and in_running_call(self._modules):
            return
        self._waiting.add(own)
        try:
            while self._changing not in (None, own):
                self._condition.wait()
        finally:
            self._waiting.discard(own)

    def leave(self, call: object, *hook: Any) -> None:
        """Note that a call of this thread has ended, see `enter`; safe to call twice."""
        if hook and torch.compiler.is_compiling():
            return
        own, name = threading.get_ident(), id(call)
        with self._condition:
            thread, names = self._calls.pop(own, (threading.current_thread(), []))
            if name in names and names.index(name) > 0:
                self._calls[own] = thread, names[: names.index(name)]
            self._condition.notify_all()

    @contextlib.contextmanager
    def change(self) -> Iterator[None]:
        """Run the block while no other thread is in a call and none can begin one."""
        own = threading.get_ident()
        if self._changing == own:  # a change that is part of another
            yield
            return
        with self._condition:
            while self._changing is not None:
                self._condition.wait()
            self._changing = own
        try:
            self.install()
            with self._condition:
                while self._called_by_others(own):
                    self._condition.wait(POLL_SECONDS)
                self._uncounted = False
            yield
        finally:
            with self._condition:
                self._changing = None
                self._condition.notify_all()

    def _called_by_others(self, own: int) -> bool:
        if any(i != own and thread.is_alive() for i, (thread, _) in self._calls.items()):
            return True
        return self._uncounted and bool(threads_in(self._modules) - self._waiting)


def threads_in(modules: Collection[nn.Module]) -> set[int]:
    """Ids of the other threads that are in a call of one of these modules.

    A patch that compresses nothing installs no hooks. When its plan changes, calls may be running
    that began without them, and only the stacks of their threads show these.
    """
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


def _calls(frame: FrameType | None, modules: Collection[nn.Module], names: Collection[str]) -> bool:
    """Whether a stack has a function of one of these names whose `self` is one of the modules."""
    while frame is not None:
        if any(name in frame.f_code.co_name for name in names):
            owner = frame.f_locals.get("self")
            if any(owner is module for module in modules):
                return True
        frame = frame.f_back
    return False
