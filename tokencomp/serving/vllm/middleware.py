"""ASGI middleware that `tokencomp serve --engine vllm` puts before vLLM's routes.

vLLM passes "mm_processor_kwargs" of a request on only with `--trust-request-mm-kwargs`. This flag
also allows "media_io_kwargs", with which a client can make vLLM decode every frame of a video, so
the middleware refuses them. It also answers 400 to a file: URL that names no file, for which vLLM
alone would answer 500 and close the connection.
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
    """Refuse requests that vLLM should not see.

    Requests that set `media_io_kwargs` or name files that cannot be read get status 400, and bodies
    of more than `max_body` bytes get status 413.
    """

    def __init__(self, app: Callable[..., Awaitable[None]], max_body: int = MAX_BODY) -> None:
        self.app, self.max_body = app, max_body

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Read the whole body, check it, and pass it on to the application."""
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
        """Run the application on a body that was read already."""
        sent = started = False

        async def replay() -> Message:
            nonlocal sent
            if sent:
                return await receive()
            sent = True
            return {"type": "http.request", "body": body, "more_body": False}

        async def send_and_note(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self.app(scope, replay, send_and_note)
        except OSError as error:
            # Only file operations set a file name. The answer does not contain it, because the
            # client must not learn about files of the server.
            if started or error.filename is None or b"file:" not in body:
                raise
            await _refuse(send, 400, "a file: URL of this request names no readable file.")


def sets_closed(body: bytes) -> bool:
    """Whether a JSON body has a non-empty `media_io_kwargs` at any depth."""
    has_closed = False

    def check_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        nonlocal has_closed
        has_closed = has_closed or any(key == CLOSED and bool(value) for key, value in pairs)
        return dict(pairs)

    try:
        json.loads(body, object_pairs_hook=check_object)
    except (ValueError, RecursionError):
        return CLOSED.encode() in body  # vLLM's parser may accept more than this one
    return has_closed


async def _refuse(send: Send, status: int, text: str) -> None:
    """Send an error in the form of OpenAI's API."""
    error = {"message": text, "type": "invalid_request_error", "param": None, "code": status}
    content = json.dumps({"error": error}).encode()
    headers = [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": content})
