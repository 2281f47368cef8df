"""ASGI middleware that `tokencomp serve --engine vllm` puts before vLLM's routes.

vLLM itself asks for its key only below some paths, and reads bodies of any size for any time. So
only the documented paths pass, all of them but those of probes need the key, and bodies have the
limits of the transformers server. `request_checks` decides which bodies vLLM may see. To media that
vLLM cannot process although they passed, the answer is 400, where vLLM would answer 500.
"""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from pathlib import Path

from anyio import CapacityLimiter, to_thread
from PIL.Image import DecompressionBombError
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tokencomp.serving import ENV_OPTIONS
from tokencomp.serving.bind import Bind
from tokencomp.serving.hf.bodies import Bodies
from tokencomp.serving.hf.errors import RequestError
from tokencomp.serving.hf.guard import error_response
from tokencomp.serving.hf.head import OPEN_PATHS, check_head, has_body
from tokencomp.serving.hf.media import Limits
from tokencomp.serving.spec import ServerOptions
from tokencomp.serving.vllm.model_card import MODELS, names_model, send_card, send_page
from tokencomp.serving.vllm.request_checks import check_request
from tokencomp.serving.vllm.rules import Rules

logger = logging.getLogger("vllm.tokencomp")

PATHS = (*OPEN_PATHS, "/v1/chat/completions", MODELS, "/version")
CHECKING = 4  # number of requests whose media are checked at the same time
UNREADABLE = (OSError, RuntimeError, ZeroDivisionError, DecompressionBombError)


class Guard:
    """Refuse requests that vLLM should not see; see the module's docstring."""

    def __init__(self, app: ASGIApp, limits: Limits | None = None) -> None:
        self.app, self.rules = app, Rules.from_environment()
        host, *allowed = self.rules.hosts
        key = os.environ.get("VLLM_API_KEY") or None
        self.bind = Bind(host, api_key=key, allowed_hosts=tuple(allowed))
        path = Path(self.rules.media_path) if self.rules.media_path else None
        limits = replace(limits or Limits(), allowed_path=path, frames=self.rules.frames)
        self.limits = limits
        self.options = ServerOptions.parse(os.environ.get(ENV_OPTIONS))
        self.bodies = Bodies(limits.max_body, limits.max_bodies, limits.body_seconds)
        self.checking = CapacityLimiter(CHECKING)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application on a request that is allowed, and answer any other one."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008, "reason": "no such path"})
            return
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        exchange = _Exchange(receive, send)
        try:
            check_head(scope, self.bind)
            if names_model(scope):
                await send_card(self.app, scope, exchange.receive, exchange.send)
                return
            if scope["path"] == "/" and scope["method"] == "GET":
                setting, keyed = self.options.default.describe(), bool(self.bind.api_key)
                await send_page(self.app, scope, exchange.receive, exchange.send, setting, keyed)
                return
            if scope["path"] not in PATHS:
                known = ", ".join(PATHS)
                raise RequestError(f"no path {scope['path']!r}; this server has {known}.", 404)
            if scope["method"] == "POST":
                await self._read(exchange, scope)
            await self.app(scope, exchange.receive, exchange.send)
        except RequestError as error:  # also of `frames`, in the application
            if exchange.started:
                raise
            answer = error_response(error)
            if has_body(scope) and exchange.body is None:
                answer.headers["Connection"] = "close"  # the rest of the body will not be read
            logger.info("%s %s: %r", scope["method"][:20], error.status, str(error)[:200])
            await answer(scope, receive, send)
        except Exception as error:
            if exchange.started or not _from_media(error):
                raise
            # The answer does not contain the error, as it may tell about files of the server.
            logger.warning("tokencomp: media of a request cannot be read", exc_info=error)
            unreadable = RequestError("media of this request are unreadable.")
            await error_response(unreadable)(scope, receive, send)

    async def _read(self, exchange: _Exchange, scope: Scope) -> None:
        """Read and check the body of a request."""
        async with self.bodies.read(Request(scope, exchange.receive)) as content:
            exchange.body = bytes(content)
            exchange.body = await to_thread.run_sync(
                check_request, exchange.body, self.rules, self.limits, self.options,
                limiter=self.checking,
            )  # fmt: skip


class _Exchange:
    """One request, whose body has been read before the application asks for it, and its answer."""

    def __init__(self, receive: Receive, send: Send) -> None:
        self._receive, self._send = receive, send
        self.body: bytes | None = None
        self.started = self._delivered = False

    async def receive(self) -> Message:
        """Return the body once if it has been read, and what the client sends before and after."""
        if self.body is None or self._delivered:
            return await self._receive()
        self._delivered, body, self.body = True, self.body, b""  # the application has a copy
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(self, message: Message) -> None:
        """Send a message, and note that the answer has started."""
        self.started = True
        await self._send(message)


def _from_media(error: BaseException) -> bool:
    """Whether vLLM raised `error` while it read or processed media, and not in the engine."""
    place = error.__traceback__ if isinstance(error, UNREADABLE) else None
    while place is not None:
        if str(place.tb_frame.f_globals.get("__name__", "")).startswith("vllm.multimodal."):
            return True
        place = place.tb_next
    return False
