"""Counts the running calls of a model: its patch changes only while there is none."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from weakref import WeakKeyDictionary

from torch import nn

from tokencomp.errors import ModelInUseError

_GATES: WeakKeyDictionary[nn.Module, CallGate] = WeakKeyDictionary()
_CREATING = threading.Lock()


class CallGate:
    """Lets many threads call a patched model, and refuses to change its patch meanwhile.

    A model without hooks is not counted, so the first `patch` cannot see a call that is running.
    That call stays uncompressed as far as it has come: what it has noted nothing of is left alone.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a change may be part of another change
        self._running = 0

    @classmethod
    def of(cls, model: nn.Module) -> CallGate:
        """The gate of a model (without wrappers); all patches of the model share it."""
        with _CREATING:
            return _GATES.setdefault(model, cls())

    @contextlib.contextmanager
    def change(self) -> Iterator[None]:
        """Change the patch in the block; calls that begin meanwhile wait for its end.

        Raises
        ------
        ModelInUseError
            A call is running, in this thread or another one.
        """
        with self._lock:
            if self._running:
                raise ModelInUseError(
                    f"patch, set and unpatch change a model, and {self._running} of its calls are "
                    "running. Wait until they have returned, or use handle.disabled() to run a "
                    "prompt of one thread uncompressed."
                )
            yield

    @contextlib.contextmanager
    def call(self) -> Iterator[None]:
        """Count a call that runs in the block."""
        with self._lock:
            self._running += 1
        try:
            yield
        finally:
            with self._lock:
                self._running -= 1
