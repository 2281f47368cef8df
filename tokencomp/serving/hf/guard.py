"""What every HTTP exchange passes: host, key and content type, and the access log."""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from typing import Any
from urllib.parse import quote

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tokencomp.serving.bind import Bind
from tokencomp.serving.hf.errors import CLIENT_LEFT, RequestError
from tokencomp.serving.hf.head import check_head, has_body, is_open
from tokencomp.serving.hf.metrics import Metrics

logger = logging.getLogger("tokencomp.serving")

RETRY_SECONDS = 5  # after which clients may try again when the server is busy
MAX_REASON = 200  # characters of a refusal in the log
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


def error_response(error: RequestError) -> JSONResponse:
    """Return the answer to a request that failed, in the form of OpenAI's API."""
    headers = {}
    if error.status == 503:
        headers["Retry-After"] = str(RETRY_SECONDS)
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error.body(), error.status, headers)


class Guard:
    """ASGI middleware around all routes.

    Parameters
    ----------
    app
        The application.
    bind
        The names and the key that clients must use.
    metrics
        Where requests are counted by status, except those of probes and monitoring.
    """

    def __init__(self, app: ASGIApp, bind: Bind, metrics: Metrics) -> None:
        self.app, self.bind, self.metrics = app, bind, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check the head of a request before its body is read, answer it, and log it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        exchange = Exchange(scope, receive, send)
        try:
            check_head(scope, self.bind)
            await self.app(scope, exchange.receive, exchange.send)
        except RequestError as error:  # of the check; the application answers its own
            scope["state"]["refusal"] = str(error)
            await error_response(error)(scope, exchange.receive, exchange.send)
        except asyncio.CancelledError:  # the time of the shutdown is over
            if not exchange.status:
                late = RequestError("the server shuts down.", 503)
                await error_response(late)(scope, exchange.receive, exchange.send)
            raise
        finally:
            if not is_open(scope):
                self.metrics.requests.labels(exchange.outcome).inc()
                logger.info("%s", exchange)


class Exchange:
    """One request and its answer: adds headers to the answer, and describes both for the log.

    A handler may put the `Completion` into `request.state.completion`, and the reason of a refusal
    into `request.state.refusal`.
    """

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scope, self._receive, self._send = scope, receive, send
        self.started = time.monotonic()
        self.status, self.complete, self.body_read = 0, False, False
        sent = Headers(scope=scope).get("x-request-id", "")
        self.id = sent if REQUEST_ID.fullmatch(sent) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = self.id

    async def receive(self) -> Message:
        """Receive a message of the client, and note the end of the body."""
        message = await self._receive()
        if message["type"] == "http.request" and not message.get("more_body", False):
            self.body_read = True
        return message

    async def send(self, message: Message) -> None:
        """Send a message to the client, and note the end of the answer."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers["X-Request-Id"] = self.id
            if has_body(self.scope) and not self.body_read:
                headers["Connection"] = "close"  # the rest of the body will not be read
        await self._send(message)
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            self.complete = True

    @property
    def outcome(self) -> int:
        """Status of the answer; 499 if the client left before its end."""
        return self.status if self.complete else CLIENT_LEFT

    def __str__(self) -> str:
        client = self.scope.get("client") or ("-", 0)
        words: list[Any] = [
            client[0], self.scope["method"][:20], quote(self.scope["path"])[:100], self.outcome,
            f"{time.monotonic() - self.started:.3f}s", f"id={self.id}",
        ]  # fmt: skip
        if completion := self.scope["state"].get("completion"):
            words.append(completion)
        if refusal := self.scope["state"].get("refusal"):
            words.append(f"reason={refusal[:MAX_REASON]!r}")  # quoted, so that it stays one line
        return " ".join(map(str, words))
