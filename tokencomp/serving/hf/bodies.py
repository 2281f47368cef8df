"""Reading request bodies within limits on size and time."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

import anyio
from starlette.requests import ClientDisconnect, Request

from tokencomp.serving.hf.errors import CLIENT_LEFT, RequestError


class Bodies:
    """All request bodies in memory.

    Parameters
    ----------
    largest, total
        Largest size of one body, and of all bodies in memory, in bytes.
    seconds
        Time in which a client must send a body.
    """

    def __init__(self, largest: int, total: int, seconds: float) -> None:
        self.largest, self.total, self.seconds = largest, total, seconds
        self.used = 0

    @contextlib.asynccontextmanager
    async def read(self, request: Request) -> AsyncIterator[bytearray]:
        """Yield the body of a request, which counts towards the total inside of the block.

        Raises
        ------
        RequestError
            If the body is too large (413), late (408), or one too many (503), or if the client
            has left.
        """
        content = bytearray()
        try:
            try:
                with anyio.fail_after(self.seconds):
                    await self._fill(content, request)
            except TimeoutError:
                late = f"the body did not arrive within {self.seconds:g} s."
                raise RequestError(late, 408) from None
            except ClientDisconnect:
                raise RequestError("the client went away.", CLIENT_LEFT) from None
            yield content
        finally:
            self.used -= len(content)

    async def _fill(self, content: bytearray, request: Request) -> None:
        declared = request.headers.get("content-length", "0")
        if declared.isdecimal() and int(declared) > self.largest:
            raise RequestError(f"request bodies may have {self.largest} bytes.", 413)
        async for piece in request.stream():
            content += piece
            self.used += len(piece)
            if len(content) > self.largest:
                raise RequestError(f"request bodies may have {self.largest} bytes.", 413)
            if self.used > self.total:
                raise RequestError("the server is busy with other bodies; try again later.", 503)
