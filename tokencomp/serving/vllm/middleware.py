"""ASGI middleware that `tokencomp serve --engine vllm` puts before vLLM's routes.

vLLM passes "mm_processor_kwargs" of a request on only with `--trust-request-mm-kwargs`. This flag
also allows "media_io_kwargs", with which a client can make vLLM decode every frame of a video, so
the middleware refuses them. It also answers 400 to media that cannot be read, for which vLLM alone
would answer 500, and to a file: URL of something that is no file, which vLLM would wait for. A
request that calls the server by a name that is not its own gets 403, see `Bind.serves`.

A body is read and checked when the application reads it. vLLM has checked the key of the request
by then, so that clients without a key cannot make the server work.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import stat
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from PIL.Image import DecompressionBombError

from tokencomp.serving import ENV_HOSTS
from tokencomp.serving.bind import Bind
from tokencomp.serving.hf.errors import RequestError
from tokencomp.serving.hf.media import Limits

logger = logging.getLogger("vllm.tokencomp")

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]
CLOSED = "media_io_kwargs"
MAX_BODY = 2 * Limits.max_bytes
UNREADABLE = (OSError, RuntimeError, ZeroDivisionError, DecompressionBombError)
NO_FILE = "a file: URL of this request names no readable file."


class OwnOptionsOnly:
    """Refuse requests that vLLM should not see.

    Requests that set `media_io_kwargs` or bring media that cannot be read get status 400, and
    bodies of more than `max_body` bytes get status 413. Requests to other host names than the
    environment allows get status 403.
    """

    def __init__(self, app: App, max_body: int = MAX_BODY) -> None:
        self.app, self.max_body = app, max_body
        host, *allowed = json.loads(os.environ.get(ENV_HOSTS) or '[""]')
        self.bind = Bind(host, allowed_hosts=tuple(allowed))

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Run the application on a request whose body is checked when it is read."""
        if scope["type"] in ("http", "websocket") and (problem := self._host_problem(scope)):
            if scope["type"] == "http":
                await _send_error(send, RequestError(problem, 403))
            else:
                await send({"type": "websocket.close", "code": 1008, "reason": problem})
            return
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            await self.app(scope, receive, send)
            return
        exchange = _Exchange(receive, send, self.max_body)
        try:
            await self.app(scope, exchange.receive, exchange.send)
        except Exception as error:
            if exchange.refused is None and not exchange.explains(error):
                raise
            if exchange.refused is None:
                exchange.refuse_media(error)
        if exchange.refused is not None and not exchange.started:
            await _send_error(send, exchange.refused)

    def _host_problem(self, scope: Message) -> str:
        """Return why the Host header of a request is refused, or ""."""
        names = [value for name, value in scope.get("headers", ()) if name == b"host"] or [b""]
        return next(filter(None, (self.bind.refusal(n.decode("latin-1")) for n in names)), "")


class _Exchange:
    """One request: reads its whole body at the first call of `receive`, and notes the answer."""

    def __init__(self, receive: Receive, send: Send, max_body: int) -> None:
        self._receive, self._send, self._max_body = receive, send, max_body
        self.body: bytes | None = None
        self.started = False
        self.refused: RequestError | None = None

    async def receive(self) -> Message:
        """Return the checked body, then what follows it.

        Raises
        ------
        RequestError
            If the body is too long or has what vLLM should not see.
        """
        if self.body is not None:
            return await self._receive()
        body, more = bytearray(), True
        while more:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                return message
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > self._max_body:
                self._refuse(f"request bodies may have {self._max_body} bytes.", 413)
        self.body = bytes(body)
        if problem := await asyncio.to_thread(find_problem, self.body):
            self._refuse(problem)
        return {"type": "http.request", "body": self.body, "more_body": False}

    def _refuse(self, message: str, status: int = 400) -> None:
        self.refused = RequestError(message, status)
        raise self.refused

    def explains(self, error: Exception) -> bool:
        """Whether the media of the body, and not the server, are the reason of an error."""
        if self.started or self.body is None or not isinstance(error, UNREADABLE):
            return False
        return _from_media(error, self.body)

    def refuse_media(self, error: Exception) -> None:
        """Note the answer to media that cannot be read.

        It does not contain the error, because the client must not learn about files of the server.
        """
        logger.warning("tokencomp: media of a request cannot be read", exc_info=error)
        has_file = isinstance(error, OSError) and error.filename is not None
        self.refused = RequestError(NO_FILE if has_file else "media of this request are unreadable")

    async def send(self, message: Message) -> None:
        """Pass an answer on, unless the request was refused: the application has another text."""
        if self.refused is None:
            self.started = True
            await self._send(message)


def find_problem(body: bytes) -> str:
    """Return why vLLM should not see a JSON body, or "".

    It may not set `media_io_kwargs` to something at any depth, and file: URLs must name files.
    Most bodies are not parsed, as the raw bytes show that there is neither. JSON can hide ASCII
    text only in escapes, and in UTF-16 or UTF-32, which contain zero bytes.
    """
    hidden = any(part in body for part in (CLOSED.encode(), b"\\u", b"\0"))
    if not hidden and b"file:" not in body.lower():
        return ""
    problems: list[str] = []

    def check_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if any(key == CLOSED and bool(value) for key, value in pairs):
            problems.append(f"{CLOSED} is not open to requests on this server.")
        for path in _file_paths(value for _, value in pairs):
            if not _may_be_opened(path):
                problems.append(NO_FILE)
        return dict(pairs)

    try:
        json.loads(body, object_pairs_hook=check_object)
    except (ValueError, RecursionError):
        # vLLM's parser may accept more than this one.
        return f"{CLOSED} is not open to requests." if CLOSED.encode() in body else ""
    return problems[0] if problems else ""


def _file_paths(values: Iterator[Any]) -> Iterator[Path]:
    """Yield the paths of the strings that are file: URLs."""
    for value in values:
        if isinstance(value, str) and value.lstrip()[:5].lower() == "file:":
            try:
                url = urlsplit(value.strip())
            except ValueError:
                continue
            yield Path(url2pathname(url.netloc + url.path))


def _may_be_opened(path: Path) -> bool:
    """Whether opening the path cannot wait for ever, as opening a pipe or a device can."""
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except OSError:
        return True  # opening it fails at once
    except ValueError:  # a zero byte in the path
        return False


def _from_media(error: BaseException, body: bytes) -> bool:
    """Whether vLLM raised `error` while it read or processed media, and not in the engine."""
    if isinstance(error, OSError) and error.filename is not None:
        return b"file:" in body.lower()
    place = error.__traceback__
    while place is not None:
        if str(place.tb_frame.f_globals.get("__name__", "")).startswith("vllm.multimodal."):
            return True
        place = place.tb_next
    return False


async def _send_error(send: Send, error: RequestError) -> None:
    """Send an error in the form of OpenAI's API."""
    headers = [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps(error.body()).encode()})
