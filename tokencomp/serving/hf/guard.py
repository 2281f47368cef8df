"""The checks before all routes of the server on transformers, and its access log."""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from typing import Any
from urllib.parse import quote

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from tokencomp.serving.bind import Bind
from tokencomp.serving.hf.errors import CLIENT_LEFT, RequestError
from tokencomp.serving.hf.metrics import Metrics
from tokencomp.serving.http import Exchange, check_head, is_open

logger = logging.getLogger("tokencomp.serving")

MAX_REASON = 200  # characters of a refusal in the log
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


class Guard:
    """ASGI middleware around all routes, which counts requests but those of probes."""

    def __init__(self, app: ASGIApp, bind: Bind, metrics: Metrics) -> None:
        self.app, self.bind, self.metrics = app, bind, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check the head of a request before its body is read, answer it, and log it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        exchange = LoggedExchange(scope, receive, send)
        try:
            check_head(scope, self.bind)
            await self.app(scope, exchange.receive, exchange.send)
        except RequestError as error:  # of the check; the application answers its own
            scope["state"]["refusal"] = str(error)
            await exchange.refuse(error)
        except asyncio.CancelledError:  # the time of the shutdown is over
            if not exchange.status:
                await exchange.refuse(RequestError("the server shuts down.", 503))
            raise
        finally:
            if not is_open(scope):
                self.metrics.requests.labels(exchange.outcome).inc()
                logger.info("%s", exchange)


class LoggedExchange(Exchange):
    """An exchange with an id, which describes itself for the log.

    A handler may put the `Completion` into `request.state.completion`, and the reason of a refusal
    into `request.state.refusal`.
    """

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        super().__init__(scope, receive, send)
        self.started = time.monotonic()
        sent = Headers(scope=scope).get("x-request-id", "")
        self.id = sent if REQUEST_ID.fullmatch(sent) else uuid.uuid4().hex
        self.headers["X-Request-Id"] = self.id
        scope.setdefault("state", {})["request_id"] = self.id

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
