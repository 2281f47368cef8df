"""Memory for the media of all requests: decoders at one time, and decoded media that wait."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from anyio import CapacityLimiter

from tokencomp.serving.limits import RequestError

DECODING = 4  # requests whose media are decoded at one time
MAX_MEDIA = 4 << 30  # bytes of decoded media of requests that wait for the engine


class MediaRoom:
    """Bounds the media of all requests on either engine.

        check() ──► enter: one of 4 decodes ──► leave ──► hold(bytes) ──► the engine begins

    On vLLM the decoded size is known only when the engine gets the request, so up to 4 requests may
    come on top of `most`.
    """

    def __init__(self, most: int = MAX_MEDIA) -> None:
        self.most, self.used = most, 0
        self.decoding = CapacityLimiter(DECODING)
        self._inside: set[Any] = set()

    def check(self, size: int = 0) -> None:
        """Raise `RequestError` (503) if media of `size` bytes find no room."""
        # One request of any size passes when nothing is held, else it could never run.
        if self.used and self.used + size > self.most:
            raise RequestError("the server is busy with media of others; try again later.", 503)

    async def enter(self, request: Any) -> None:
        """Wait until the media of a request may be decoded."""
        await self.decoding.acquire_on_behalf_of(request)
        self._inside.add(request)

    def leave(self, request: Any) -> None:
        """End the decoding of a request. Repeated calls are harmless."""
        if request in self._inside:
            self._inside.remove(request)
            self.decoding.release_on_behalf_of(request)

    def hold(self, size: int) -> Callable[[], None]:
        """Count `size` bytes until the returned function is called, which may be repeated."""
        held = [size]
        self.used += size

        def release() -> None:
            while held:
                self.used -= held.pop()

        return release
