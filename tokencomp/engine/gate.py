"""Calls of a patched model run side by side; a change of its patch waits until none is running."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

POLL_SECONDS = 0.1  # how often a waiting change looks whether a calling thread has died


class CallGate:
    """Counts running calls by thread, and lets one thread at a time change what calls depend on.

    A thread that died, or the calling thread itself, never blocks a change: their calls have
    ended without a word (an interrupt from the keyboard skips the hooks that would say so).
    """

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._running: dict[int, threading.Thread] = {}
        self._changing: int | None = None

    def enter(self) -> None:
        """A call begins in this thread; waits while another thread makes a change."""
        thread = threading.current_thread()
        with self._condition:
            while self._changing not in (None, threading.get_ident()):
                self._condition.wait()
            self._running[threading.get_ident()] = thread

    def leave(self) -> None:
        """The call of this thread has ended; safe to call twice."""
        with self._condition:
            self._running.pop(threading.get_ident(), None)
            self._condition.notify_all()

    @contextlib.contextmanager
    def change(self) -> Iterator[None]:
        """Alone inside the block: no other thread is in a call, and none begins one."""
        own = threading.get_ident()
        with self._condition:
            if self._changing == own:  # a change that is part of another
                nested = True
            else:
                nested = False
                while self._changing is not None:
                    self._condition.wait()
                self._changing = own
                while any(i != own and t.is_alive() for i, t in self._running.items()):
                    self._condition.wait(POLL_SECONDS)
        try:
            yield
        finally:
            if not nested:
                with self._condition:
                    self._changing = None
                    self._condition.notify_all()
