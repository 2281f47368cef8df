"""HTTP on every engine: checks of head and body, and errors as answers."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import quote

import anyio
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tokencomp import __version__
from tokencomp.serving.bind import Bind
from tokencomp.serving.limits import CLIENT_LEFT, Limits, RequestError
from tokencomp.serving.load import client_of
from tokencomp.serving.saved import ServerMetrics

OPEN_PATHS = ("/health", "/ping", "/metrics")  # for probes and monitoring, which have no key
READING = 4  # requests whose body is parsed at one time
RETRY_SECONDS = 5  # after which clients may try again when the server is busy
MAX_REASON = 200  # characters of a refusal in the log
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
QUESTION = {"max_tokens": 16, "messages": [{"role": "user", "content": "Hello"}]}


def route(scope: Scope) -> str:
    """The path of a request without the prefix of a proxy (vLLM's `--root-path`)."""
    path: str = scope["path"]
    rest = path.removeprefix(scope.get("root_path") or "")
    return rest if rest.startswith("/") else path


def is_open(scope: Scope) -> bool:
    return route(scope) in OPEN_PATHS and scope["method"] in ("GET", "HEAD")


def check_head(scope: Scope, bind: Bind) -> None:
    """Check host name, length of the body, key and content type, before the body is read.

    Raises `RequestError` (400, 401, 403 or 415); the rest of the connection must then not be read.
    """
    headers = Headers(scope=scope)
    # All Host headers: a proxy may use another one than this server would.
    for host in headers.getlist("host") or [""]:
        if problem := bind.refusal(host):
            raise RequestError(problem, 403)
    # A proxy may believe the other header, and take what follows the body for another request.
    if "transfer-encoding" in headers and "content-length" in headers:
        raise RequestError("Content-Length together with Transfer-Encoding: send one of them.")
    asks = "origin" in headers and "access-control-request-method" in headers
    preflight = scope["method"] == "OPTIONS" and asks  # of CORS: browsers send no key
    # Probes have no key, and browsers send none before they know that they may.
    if is_open(scope) or preflight:
        return
    if not bind.accepts(headers.get("authorization", "")):
        raise RequestError("missing or wrong API key (Authorization: Bearer KEY).", 401)
    content_type = headers.get("content-type", "").partition(";")[0].strip().lower()
    # Browsers let any web page send other types than this one to any server.
    if scope["method"] == "POST" and content_type != "application/json":
        raise RequestError("send Content-Type: application/json.", 415)


def error_response(error: RequestError) -> JSONResponse:
    """Return the answer to a request that failed, in the form of OpenAI's API."""
    headers = {}
    if error.status == 503:
        headers["Retry-After"] = str(RETRY_SECONDS)
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error.body(), error.status, headers)


class Exchange:
    """One request and its answer, in the state of the request; its string is a line of the log.

    `status` is 0 before the answer starts; `headers` are further ones of the answer. `ends` has
    what happens after the answer. `by_load` says that the load chooses the ratio of the request.
    For the log, `details` say what was done, `refusal` why not, `failed` that nobody has answered.
    `error` is a refusal of tokencomp inside of vLLM.
    """

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scope, self._receive, self._send = scope, receive, send
        self.status, self.complete, self.body_read, self.failed = 0, False, False, False
        self.details: Any = None
        self.refusal = ""
        self.error: RequestError | None = None
        self.by_load, self.ends = False, contextlib.ExitStack()
        self._started = time.monotonic()
        # An id of a client is taken only in this form: it is written to logs and headers.
        sent = Headers(scope=scope).get("x-request-id", "")
        self.id = sent if REQUEST_ID.fullmatch(sent) else uuid.uuid4().hex
        self.headers: dict[str, str] = {"X-Request-Id": self.id}
        scope.setdefault("state", {})["exchange"] = self

    @property
    def outcome(self) -> int:
        """Status of the answer; 499 if the client left before its end."""
        if self.failed:
            return 500
        return self.status if self.complete else CLIENT_LEFT

    @property
    def client(self) -> str:
        return client_of(self.scope)

    def __str__(self) -> str:
        client = self.scope.get("client") or ("-", 0)
        words: list[Any] = [
            client[0], self.scope["method"][:20], quote(self.scope["path"])[:100], self.outcome,
            f"{time.monotonic() - self._started:.3f}s", f"id={self.id}",
        ]  # fmt: skip
        if self.details is not None:
            words.append(self.details)
        if self.refusal:
            words.append(f"reason={self.refusal[:MAX_REASON]!r}")  # quoted: it stays one line
        return " ".join(map(str, words))

    async def receive(self) -> Message:
        """Receive a message of the client, and note the end of the body."""
        message = await self._receive()
        if message["type"] == "http.request" and not message.get("more_body", False):
            self.body_read = True
        return message

    async def send(self, message: Message) -> None:
        """Send a message to the client, and note start and end of the answer."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers.update(self.headers)
            asked = Headers(scope=self.scope)
            # An answer before the end of the body: what follows must not be read as the next
            # request.
            announced = asked.get("content-length", "0") != "0" or "transfer-encoding" in asked
            if announced and not self.body_read:
                headers["Connection"] = "close"  # the rest of the body will not be read
        await self._send(message)
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            self.complete = True

    async def refuse(self, error: RequestError) -> None:
        """Answer with an error."""
        self.refusal = str(error)
        await error_response(error)(self.scope, self.receive, self.send)


class Guard:
    """ASGI middleware before the routes of a server: checks the head of a request, and logs it."""

    def __init__(
        self, app: ASGIApp, bind: Bind, metrics: ServerMetrics, logger: logging.Logger
    ) -> None:
        self.app, self.bind, self.metrics, self.logger = app, bind, metrics, logger

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application on a request that is allowed, and answer any other one."""
        if scope["type"] != "http":
            await self.other(scope, receive, send)
            return
        exchange = Exchange(scope, receive, send)
        try:
            check_head(scope, self.bind)
            await self.answer(exchange)
        except asyncio.CancelledError:  # the time of the shutdown is over
            if not exchange.status:
                await exchange.refuse(RequestError("the server shuts down.", 503))
            raise
        except Exception as error:
            refusal = self.refusal(error)
            # The answer has begun, or the error is of the server: uvicorn ends the connection.
            if exchange.status or refusal is None:
                exchange.failed = True
                raise
            await exchange.refuse(refusal)
        finally:
            exchange.ends.close()
            if not is_open(scope):
                self.metrics.requests.labels(exchange.outcome).inc()
                if self.logs(exchange):
                    self.logger.info("%s", exchange)

    async def other(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application on what is no request: start and end of the server."""
        await self.app(scope, receive, send)

    async def answer(self, exchange: Exchange) -> None:
        """Run the application on a request whose head is allowed."""
        await self.app(exchange.scope, exchange.receive, exchange.send)

    def refusal(self, error: Exception) -> RequestError | None:
        """The answer to a request that failed with an error; None: the answer of the server."""
        return error if isinstance(error, RequestError) else None

    def logs(self, exchange: Exchange) -> bool:
        """Whether an exchange has a line in this log."""
        return True


class Bodies:
    """Bounds the bodies in memory: bytes of one and of all, and seconds of their arrival.

    `reading` bounds how many of them are parsed at one time.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits, self.reading, self.used = limits, anyio.CapacityLimiter(READING), 0

    @contextlib.asynccontextmanager
    async def read(self, request: Request) -> AsyncIterator[bytearray]:
        """Yield the body of a request, which counts towards the total inside of the block.

        Raises `RequestError`: too large (413), late (408), one too many (503), or the client left.
        """
        content = bytearray()
        try:
            try:
                with anyio.fail_after(self.limits.body_seconds):
                    await self._fill(content, request)
            except TimeoutError:
                late = f"the body did not arrive within {self.limits.body_seconds:g} s."
                raise RequestError(late, 408) from None
            except ClientDisconnect:
                raise RequestError("the client went away.", CLIENT_LEFT) from None
            yield content
        finally:
            self.used -= len(content)

    async def _fill(self, content: bytearray, request: Request) -> None:
        # Refuse by the header first: none of the body is read.
        declared, largest = request.headers.get("content-length", "0"), self.limits.max_body
        if declared.isdecimal() and int(declared) > largest:
            raise RequestError(f"request bodies may have {largest} bytes.", 413)
        async for piece in request.stream():
            content += piece
            self.used += len(piece)
            if len(content) > largest:
                raise RequestError(f"request bodies may have {largest} bytes.", 413)
            if self.used > self.limits.max_bodies:
                raise RequestError("the server is busy with other bodies; try again later.", 503)


def first_page(
    request: Request, name: str, setting: dict[str, Any], keyed: bool
) -> PlainTextResponse:
    """The answer to `GET /`: the served model, its default setting, and a curl command."""
    root = request.scope.get("root_path") or ""
    address = f"{request.url.scheme}://{request.url.netloc}{root}"
    key = ' -H "Authorization: Bearer $TOKENCOMP_API_KEY"' if keyed else ""
    text = (
        f"tokencomp {__version__} serves {name} with {json.dumps(setting)}\n\n"
        f"curl {address}/v1/chat/completions{key} "
        f"-H 'Content-Type: application/json' -d '{json.dumps(QUESTION)}'\n"
    )
    return PlainTextResponse(text, headers={"X-Content-Type-Options": "nosniff"})
