"""The time limit of decoding media, also inside of libraries that decode."""

from __future__ import annotations

import io
import time
from collections.abc import Callable

from tokencomp.serving.hf.errors import RequestError


class Deadline:
    """End of the time in which the media of a request must be decoded.

    Parameters
    ----------
    seconds
        Time from now on.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds, self.cancelled = seconds, False
        self._then: Callable[[], None] | None = None
        self.start()

    def start(self) -> None:
        """Start the time again, because the work begins only now."""
        self._end = time.monotonic() + self.seconds

    def cancel(self) -> None:
        """End the time for good, because the client has left.

        Another thread than the one that decodes may call this method.
        """
        self.cancelled = True
        if self._then is not None:
            self._then()

    def when_cancelled(self, then: Callable[[], None]) -> None:
        """Call `then` when the client leaves, or now if it has left, in place of earlier ones."""
        self._then = then
        if self.cancelled:
            then()

    def remaining(self) -> float:
        """Return the seconds that are left, at least 0."""
        return 0.0 if self.cancelled else max(self._end - time.monotonic(), 0.0)

    def check(self) -> None:
        """Raise `RequestError` (413) after the end."""
        if self.cancelled or time.monotonic() >= self._end:
            raise RequestError(
                f"the media were not decoded within {self.seconds:g} s. Send fewer or smaller "
                "media.",
                413,
            )

    def reader(self, content: bytes) -> io.BytesIO:
        """Return a file of `content` whose reads fail after the end.

        Decoders read as they go, so this also ends loops inside of libraries.
        """
        return _TimedReader(content, self)


class _TimedReader(io.BytesIO):
    def __init__(self, content: bytes, deadline: Deadline) -> None:
        super().__init__(content)
        self.deadline = deadline

    def read(self, size: int | None = -1, /) -> bytes:
        self.deadline.check()
        return super().read(size)
