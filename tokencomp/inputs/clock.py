"""CPU seconds of the parts of reading files, of all threads of this process."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

PARTS = ("open", "select", "decode", "resize")
"""List the packets; choose frames; decode; convert and scale what was chosen."""

_running: ContextVar[tuple[dict[str, float], list[float]] | None] = ContextVar("file", default=None)


@contextmanager
def file_times() -> Iterator[dict[str, float]]:
    """CPU seconds by part of everything that `load_media` reads in the block."""
    seconds = dict.fromkeys(PARTS, 0.0)
    token = _running.set((seconds, []))
    try:
        yield seconds
    finally:
        _running.reset(token)


@contextmanager
def part(name: str) -> Iterator[None]:
    """Count the block as a part, without the parts inside of it."""
    running = _running.get()
    if running is None:
        yield
        return
    seconds, inner = running
    start = time.process_time()
    inner.append(0.0)
    try:
        yield
    finally:
        whole = time.process_time() - start
        seconds[name] += whole - inner.pop()
        if inner:
            inner[-1] += whole
