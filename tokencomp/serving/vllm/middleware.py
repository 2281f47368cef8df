"""ASGI middleware that `tokencomp serve --engine vllm` puts before vLLM's routes.

vLLM itself asks for its key only below some paths, and reads bodies of any size for any time. So
only the documented paths pass, all of them but those of probes need the key, and bodies have the
limits of the transformers server. `request_checks` decides which bodies vLLM may see, and resolves
the method of a request, which `rules` gives to the processor. To media that vLLM cannot process
although they passed, the answer is 400, where vLLM would answer 500. The usage of an answer and the
log say what compression saved.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import AsyncGenerator, Callable, Mapping
from contextvars import ContextVar
from functools import partial
from typing import Any

from anyio import to_thread
from PIL.Image import DecompressionBombError
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from torch import Tensor

from tokencomp.serving import ENV_OPTIONS, KEY
from tokencomp.serving.http import (
    OPEN_PATHS,
    Bodies,
    Exchange,
    Guard,
    first_page,
    route,
)  # fmt: skip
from tokencomp.serving.limits import RequestError
from tokencomp.serving.load import Load
from tokencomp.serving.room import MediaRoom
from tokencomp.serving.saved import Saved, process_metrics
from tokencomp.serving.spec import ServerOptions
from tokencomp.serving.vllm import marks, process, roles
from tokencomp.serving.vllm.request_checks import check_body
from tokencomp.serving.vllm.rules import Rules, hand_on

logger = logging.getLogger("vllm.tokencomp")

CHAT, MODELS = "/v1/chat/completions", "/v1/models"
PATHS = (*OPEN_PATHS, CHAT, MODELS, "/version")
READS = ("GET", "HEAD", "OPTIONS")  # methods without a body
USAGE = b'"usage":{'  # in JSON, where the quotes of a text are escaped, these bytes are the field
EXCHANGE: ContextVar[Exchange] = ContextVar("exchange")
UNREADABLE = (OSError, RuntimeError, SyntaxError, ZeroDivisionError, DecompressionBombError)


class VllmGuard(Guard):
    """Refuse requests that vLLM should not see; see the module's docstring."""

    def __init__(self, app: ASGIApp, rules: Rules | None = None) -> None:
        self.rules = rules or Rules.from_environment()
        super().__init__(app, self.rules.bind, process_metrics(), logger)
        self.draining = False
        self.options = ServerOptions.parse(os.environ.get(ENV_OPTIONS))
        self.load = Load(self.options.ratio_by_load)
        self.bodies, self.room = Bodies(self.rules.limits), MediaRoom()

    async def other(self, scope: Scope, receive: Receive, send: Send) -> None:
        # No path of the server is one, and a handshake would pass the checks of requests.
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008, "reason": "no such path"})
            return
        client = scope["app"].state.engine_client if scope["type"] == "lifespan" else None
        if client is not None:
            self._watch(client)
        await self.app(scope, receive, send)
        if client is not None and client.errored and not self.draining:
            process.end_after_engine()

    def refusal(self, error: Exception) -> RequestError | None:
        known = super().refusal(error)  # also of `frames`, in the application
        if known is not None or not _from_media(error):
            return known
        # The answer does not contain the error, as it may tell about files of the server.
        logger.warning("tokencomp: media of a request cannot be read", exc_info=error)
        return RequestError("media of this request are unreadable.")

    def logs(self, exchange: Exchange) -> bool:
        """vLLM logs requests without a body."""
        return bool(exchange.scope["method"] == "POST" or exchange.refusal)

    def _watch(self, client: Any) -> None:
        """Wrap two functions of vLLM's client of the engine.

        `shutdown` stops the engine after SIGTERM, and waits in a thread for running requests.
        vLLM's own answers are 200 to `/health` and 500 to new requests in that time. `generate`
        gets the prompt, in which the processor has noted what it saved: the media are decoded, and
        the request waits for the engine until its first output. The prompt of a decode must
        equal the prefill's.
        """
        stop, generate = client.shutdown, client.generate

        def shutdown(*args: Any, **kwargs: Any) -> Any:
            self.draining = True
            return stop(*args, **kwargs)

        def noting(prompt: Any, sampling: Any, *args: Any, **kwargs: Any) -> Any:
            exchange = EXCHANGE.get(None)
            if exchange is None or not isinstance(prompt, dict):
                return generate(prompt, sampling, *args, **kwargs)
            saved = prompt.pop(KEY, None)
            sign = self._transferred(client, exchange, prompt, sampling)
            begun = self._note(client, exchange, prompt, sampling, saved)
            return _outputs(generate(prompt, sampling, *args, **kwargs), begun, sign)

        client.shutdown, client.generate = shutdown, noting

    def _transferred(
        self, client: Any, exchange: Exchange, prompt: dict[str, Any], sampling: Any
    ) -> Callable[[Mapping[str, Any]], str] | None:
        """Check what other roles have handed over; return what signs what this one hands over."""
        config, key = getattr(client, "vllm_config", None), self.rules.router_key
        transfer = roles.transfer_params(sampling, roles.KV_PARAMS)
        try:
            marks.check_transfer(prompt, transfer, key, marks.lease_of(config))
            roles.check_grids(prompt, sampling, config)
        except RequestError as error:  # to which vLLM answers 400, and `answer` the status of ours
            exchange.refusal, exchange.error = str(error), error
            roles.forget(client, prompt)
            raise
        return None if transfer is None else partial(marks.mark_of, marks.hash_of(prompt), key=key)

    def _note(
        self, client: Any, exchange: Exchange, prompt: dict[str, Any], sampling: Any, saved: Any
    ) -> Callable[[], None]:
        """Count what a prompt saved; return what to call at the first output of the engine."""
        if saved is None:
            return lambda: None
        transfer = roles.transfer_params(sampling, roles.KV_PARAMS)
        self.metrics.count(saved, roles.role_of(getattr(client, "vllm_config", None), transfer))
        exchange.details = saved
        self.room.leave(exchange)
        begun = self.room.hold(media_bytes(prompt.get("mm_kwargs")))
        exchange.ends.callback(begun)
        if exchange.by_load:
            exchange.ends.callback(self.load.join(exchange.client, saved.before))
        return begun

    def _check_running(self, exchange: Exchange) -> None:
        """Refuse a request while the server shuts down, unless it asks for metrics."""
        if self.draining and route(exchange.scope) != "/metrics":
            exchange.headers["Connection"] = "close"
            raise RequestError("the server shuts down. Ask another one, or this one later.", 503)

    async def answer(self, exchange: Exchange) -> None:
        """Run the application on a documented path, or answer what vLLM lacks."""
        EXCHANGE.set(exchange)
        self._check_running(exchange)
        scope, path = exchange.scope, route(exchange.scope)
        receive: Receive = exchange.receive
        if scope["method"] == "GET" and (path == "/" or path.startswith(f"{MODELS}/")):
            answer = await self._about(scope, path, receive)
            await answer(scope, receive, exchange.send)
            return
        # vLLM adds paths with its releases; unchecked ones are closed.
        known = (*PATHS, *self.rules.paths)
        if not any(path == k or (k.endswith("/") and path.startswith(k)) for k in known):
            raise RequestError(f"no path {path!r}; this server has {', '.join(known)}.", 404)
        if path == "/metrics":
            self.metrics.load_step.set(self.load.look())
        if scope["method"] in READS:
            await self.app(scope, receive, exchange.send)
            return
        receive = await self._checked(exchange, path == CHAT)
        self._check_running(exchange)  # the server may have begun to end meanwhile
        MutableHeaders(scope=scope)["X-Request-Id"] = exchange.id  # vLLM's id is made of it
        reply: Send = exchange.send
        # The usage of the answer gets the counts, which are known when the prompt is processed.
        if path == CHAT:
            exchange.details, reply = Saved(), _SendSaved(exchange)
        failed = False

        # vLLM answers 500 during the shutdown, and 400 to every error of ours: other statuses of
        # ours replace them, after which a client asks another server, or a router another role.
        async def send(message: Message) -> None:
            nonlocal failed
            status = message.get("status")
            failed = failed or (status == 500 and self.draining)
            failed = failed or (status == 400 and exchange.error is not None)
            if not failed:
                await reply(message)

        await self.app(scope, receive, send)
        if exchange.error is not None and failed:
            raise exchange.error
        if failed:  # vLLM was reading the prompt when the server began to shut down
            self._check_running(exchange)

    async def _checked(self, exchange: Exchange, chat: bool) -> Receive:
        """Read and check the body of a request; return what the application receives.

        Only a chat completion must have one, and only there media may be elsewhere.
        """
        async with self.bodies.read(Request(exchange.scope, exchange.receive)) as content:
            if not (chat or content):
                return _receiving(b"", exchange)
            ratio = self.load.ratio(exchange.client)
            headers = Headers(scope=exchange.scope)
            checked = await to_thread.run_sync(
                check_body, content, self.rules, self.options, ratio, chat,
                roles.is_router(headers, self.rules.router_key), limiter=self.bodies.reading,
            )  # fmt: skip
            exchange.by_load = checked.by_load
            if checked.method is not None:
                hand_on(checked.method)
            if checked.request.media:  # a text does not wait for the media of others
                await self.room.enter(exchange)
                exchange.ends.callback(self.room.leave, exchange)
                self.room.check()
            body = await to_thread.run_sync(checked.body, self.rules)
        return _receiving(body, exchange)

    async def _about(self, scope: Scope, path: str, receive: Receive) -> Response:
        """The first page, or the card of one model, which OpenAI's clients ask for."""
        body, status = bytearray(), 0

        async def collect(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            body.extend(message.get("body", b""))

        await self.app({**scope, "path": MODELS, "raw_path": MODELS.encode()}, receive, collect)
        if status != 200:
            raise RequestError("the server does not list its models yet. Ask again.", 503)
        cards: dict[str, Any] = {card["id"]: card for card in json.loads(body)["data"]}
        if path == "/":
            setting, keyed = self.options.default.describe(), bool(self.rules.bind.api_key)
            return first_page(Request(scope), next(iter(cards)), setting, keyed)
        name = path.removeprefix(f"{MODELS}/")
        if name not in cards:
            raise RequestError(f"model {name!r}: this server has {', '.join(cards)}.", 404)
        return JSONResponse(cards[name])


def _receiving(body: bytes, exchange: Exchange) -> Receive:
    waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        return waiting.pop() if waiting else await exchange.receive()

    return receive


async def _outputs(
    outputs: Any, begun: Callable[[], None], sign: Callable[[Mapping[str, Any]], str] | None
) -> AsyncGenerator[Any]:
    """Yield the outputs of the engine; call `begun` at the first, and sign what a decode gets."""
    async with contextlib.aclosing(outputs):
        async for output in outputs:
            begun()
            if sign and output.kv_transfer_params:
                params = output.kv_transfer_params
                output.kv_transfer_params = {**params, KEY: sign(params)}
            yield output


def media_bytes(value: Any) -> int:
    """Bytes of the tensors in media of vLLM; media in its caches have none."""
    if isinstance(value, Tensor):
        return value.nbytes
    if isinstance(value, Mapping):
        return sum(map(media_bytes, value.values()))
    if isinstance(value, list | tuple):
        return sum(map(media_bytes, value))
    return media_bytes(getattr(value, "data", None)) if value is not None else 0


class _SendSaved:
    """Sends an answer of vLLM (one message, or one per event) with what was saved in its usage."""

    def __init__(self, exchange: Exchange) -> None:
        self.exchange = exchange
        self._start: Message | None = None  # waits until the length of the body is known

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            if "content-length" in MutableHeaders(raw=message["headers"]):
                self._start = message
            else:
                await self.exchange.send(message)
            return
        body = message.get("body", b"")
        if USAGE in body:
            saved = json.dumps(self.exchange.details.as_usage())
            body = body.replace(USAGE, b'%s"%s":%s,' % (USAGE, KEY.encode(), saved.encode()))
        # The body has grown by the field.
        if self._start is not None:
            MutableHeaders(raw=self._start["headers"])["content-length"] = str(len(body))
            await self.exchange.send(self._start)
            self._start = None
        await self.exchange.send({**message, "body": body})


def _from_media(error: BaseException) -> bool:
    """Whether vLLM raised `error` while reading or processing media, not in the engine."""
    place = error.__traceback__ if isinstance(error, UNREADABLE) else None
    while place is not None:
        if str(place.tb_frame.f_globals.get("__name__", "")).startswith("vllm.multimodal."):
            return True
        place = place.tb_next
    return False
