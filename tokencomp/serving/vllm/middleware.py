"""What `tokencomp serve --engine vllm` puts before vLLM's routes.

vLLM hands "mm_processor_kwargs" of a request on only with `--trust-request-mm-kwargs`, which opens
"media_io_kwargs" as well: they can make it decode every frame of a video. This closes that again.
A file: URL that names no file is answered with 400; vLLM alone fails with 500, and hangs up.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from tokencomp.serving.hf.media import Limits

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
CLOSED = "media_io_kwargs"
MAX_BODY = 2 * Limits.max_bytes


class OwnOptionsOnly:
    """ASGI middleware.

    400 for requests that set `media_io_kwargs` or name files that cannot be read, 413 for bodies
    too large.
    """

    def __init__(self, app: Callable[..., Awaitable[None]], max_body: int = MAX_BODY) -> None:
        self.app, self.max_body = app, max_body

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            await self.app(scope, receive, send)
            return
        body, more = bytearray(), True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > self.max_body:
                await _refuse(send, 413, f"request bodies may have {self.max_body} bytes.")
                return
        if sets_closed(bytes(body)):
            await _refuse(send, 400, f"{CLOSED} is not open to requests on this server.")
            return
        await self._answer(scope, bytes(body), receive, send)

    async def _answer(self, scope: Message, body: bytes, receive: Receive, send: Send) -> None:
        sent = started = False

        async def replay() -> Message:
            nonlocal sent
            if sent:
                return await receive()
            sent = True
            return {"type": "http.request", "body": body, "more_body": False}

        async def noting(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self.app(scope, replay, noting)
        except OSError as error:
            # only file operations set a name; which one failed is not the client's to know
            if started or error.filename is None or b"file:" not in body:
                raise
            await _refuse(send, 400, "a file: URL of this request names no readable file.")


def sets_closed(body: bytes) -> bool:
    """True if a JSON body has a non-empty `media_io_kwargs` anywhere."""
    found = False

    def look(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        nonlocal found
        found = found or any(key == CLOSED and bool(value) for key, value in pairs)
        return dict(pairs)

    try:
        json.loads(body, object_pairs_hook=look)
    except (ValueError, RecursionError):
        return CLOSED.encode() in body  # let vLLM refuse it, unless its parser takes more
    return found


async def _refuse(send: Send, status: int, text: str) -> None:
    error = {"message": text, "type": "invalid_request_error", "param": None, "code": status}
    content = json.dumps({"error": error}).encode()
    headers = [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": content})
