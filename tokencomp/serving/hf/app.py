"""The HTTP server: routes, and uvicorn with time limits."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import logging
import logging.config
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import PIL
import uvicorn
from anyio import to_thread
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import ASGIApp
from uvicorn.config import LOGGING_CONFIG

from tokencomp import __version__
from tokencomp.serving.bind import Bind
from tokencomp.serving.connections import BoundedH11
from tokencomp.serving.hf.answers import Completion
from tokencomp.serving.hf.engine import Engine
from tokencomp.serving.hf.prompt import ChatPrompt, load, parse
from tokencomp.serving.hf.queue import Event
from tokencomp.serving.http import Bodies, Guard, error_response, first_page
from tokencomp.serving.limits import CLIENT_LEFT, Deadline, Limits, RequestError
from tokencomp.serving.load import Load
from tokencomp.serving.room import MediaRoom

logger = logging.getLogger("tokencomp.serving")

POLL = 0.5  # seconds between checks whether the client is still connected
SAFE_PILLOW = 13


def build_app(engine: Engine, name: str, limits: Limits, bind: Bind | None = None) -> ASGIApp:
    """The application, which closes the engine at its end; without `bind` open to all hosts."""

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(engine.close)

    bind = bind or Bind(host="")
    app = Starlette(lifespan=lifespan)
    server = Server(engine, name, limits, bool(bind.api_key))
    for path, handler in (
        ("/", server.page),
        ("/health", server.health),
        ("/ping", server.health),
        ("/metrics", server.metrics),
        ("/version", server.version),
        ("/v1/models", server.models),
        ("/v1/models/{name:path}", server.model),
    ):
        app.add_route(path, handler)
    app.add_route("/v1/chat/completions", server.chat, methods=["POST"])
    for kind in (RequestError, HTTPException, Exception):
        app.add_exception_handler(kind, _failed)
    # Middleware is inside of the guard, which lets preflights pass without a key.
    if bind.api_key:  # a page of any site needs the key; without one, it could use the server
        app.add_middleware(
            CORSMiddleware, allow_origins=["*"], allow_methods=["*"], allow_headers=["*"]
        )
    return Guard(app, bind, engine.metrics, logger)


class Server:
    """The handlers of all routes; `keyed`: whether requests need a key."""

    def __init__(self, engine: Engine, name: str, limits: Limits, keyed: bool = False) -> None:
        self.engine, self.name, self.limits, self.keyed = engine, name, limits, keyed
        self.started = int(time.time())
        self.bodies, self.room = Bodies(limits), MediaRoom()
        self.load = Load(engine.options.ratio_by_load)

    async def chat(self, request: Request) -> Response:
        """Answer a chat completion, whole or as a stream of events.

        The first event is awaited before the response starts: errors of the prefill have a status.
        """
        self.engine.check_room()  # refuses early, before the body is read and media are decoded
        self.room.check()
        prompt = await self._prompt(request)
        body, exchange = prompt.request, request.state.exchange
        self._check_name(body.model or self.name)
        identity = {
            "id": f"chatcmpl-{exchange.id}",  # the log names the same id
            "created": int(time.time()),
            "model": self.name,
        }
        completion = Completion(prompt, self.engine.tokenizer, identity)
        exchange.details = completion
        # Decoded media wait in memory until the engine begins; too many are refused.
        self.room.check(prompt.bytes)
        begun = self.room.hold(prompt.bytes)
        exchange.ends.callback(begun)
        if prompt.by_load:
            tokens = body.n * prompt.visual_tokens
            exchange.ends.callback(self.load.join(exchange.client, tokens))
        self.engine.submit(*completion.jobs)

        async def next_event() -> Event:
            return await _while_connected(request, completion.events.get(), completion.cancel)

        try:
            _, kind, value = await next_event()
            begun()
            if kind == "error":
                raise value
            if body.stream:
                return StreamingResponse(completion.stream(), media_type="text/event-stream")
            return JSONResponse(await completion.whole(next_event))
        except RequestError:
            completion.cancel()  # the other answers
            raise

    async def _prompt(self, request: Request) -> ChatPrompt:
        """Read and check a request, and decode its media, for which texts of others do not wait."""
        engine, deadline = self.engine, Deadline(self.limits.decode_seconds)
        async with self.bodies.read(request) as body:
            ratio = self.load.ratio(request.state.exchange.client)
            prompt = await to_thread.run_sync(
                parse, body, engine.options, self.limits, engine.text, engine.grammars, ratio,
                limiter=self.bodies.reading,
            )  # fmt: skip
            if prompt.request.media:
                decoded = to_thread.run_sync(
                    load, prompt, engine.text, deadline, limiter=self.room.decoding
                )
                await _while_connected(request, decoded, deadline.cancel)
            return prompt

    async def health(self, request: Request) -> Response:
        return Response(status_code=200 if self.engine.healthy else 503)

    async def metrics(self, request: Request) -> Response:
        self.engine.metrics.load_step.set(self.load.look())
        text = generate_latest(self.engine.metrics.registry)
        return Response(text, media_type=CONTENT_TYPE_LATEST)

    async def version(self, request: Request) -> Response:
        return JSONResponse({"version": __version__})

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def model(self, request: Request) -> Response:
        self._check_name(request.path_params["name"])
        return JSONResponse(self._card())

    async def page(self, request: Request) -> Response:
        """Say in plain text what is served, and how to ask."""
        return first_page(request, self.name, self.engine.options.default.describe(), self.keyed)

    def _card(self) -> dict[str, Any]:
        return {
            "id": self.name,
            "object": "model",
            "created": self.started,
            "owned_by": "tokencomp",
            "max_model_len": self.engine.max_model_len,
            "tokencomp": self.engine.options.default.describe(),
        }

    def _check_name(self, name: str) -> None:
        """Raise `RequestError` (404) for the name of another model."""
        if name != self.name:
            raise RequestError(f"model {name!r}: this server has {self.name!r}.", 404)


async def _while_connected(
    request: Request, work: Awaitable[Any], cancel: Callable[[], None]
) -> Any:
    """Return the result of `work`; call `cancel` if the client leaves before, or on shutdown."""
    task = asyncio.ensure_future(work)
    # Nobody awaits a task whose client has left, so its exception is taken here.
    task.add_done_callback(lambda t: t.cancelled() or t.exception())
    try:
        # Starlette does not tell handlers that a client has left: ask from time to time.
        while not (await asyncio.wait({task}, timeout=POLL))[0]:
            if await request.is_disconnected():
                raise RequestError("the client went away.", CLIENT_LEFT)
    except BaseException:
        cancel()
        task.cancel()
        raise
    return task.result()


async def _failed(request: Request, error: Exception) -> Response:
    """Answer a request that failed in the form of OpenAI's API."""
    if isinstance(error, HTTPException):
        reason = f"{error.detail}: {request.method} {request.url.path}"
        error = RequestError(reason, error.status_code)
    elif not isinstance(error, RequestError):
        error = RequestError("the server failed on this request.", 500)
    request.state.exchange.refusal = str(error)
    return error_response(error)


# -- uvicorn ---------------------------------------------------------------------------------------


def uvicorn_server(app: ASGIApp, bind: Bind) -> uvicorn.Server:
    config = uvicorn.Config(
        app,
        host=bind.host,
        port=bind.port,
        http=BoundedH11,
        ws="none",
        log_config=log_config(),
        access_log=False,  # `Guard` logs requests, with their tokens
        server_header=False,
        timeout_graceful_shutdown=bind.shutdown_timeout,
    )
    return uvicorn.Server(config)


def log_config() -> dict[str, Any]:
    """Return uvicorn's logging, which also prints the messages of this package."""
    config = copy.deepcopy(LOGGING_CONFIG)
    config["formatters"]["default"]["fmt"] = "%(asctime)s %(levelprefix)s %(message)s"
    config["loggers"]["tokencomp"] = {"handlers": ["default"], "level": "INFO", "propagate": False}
    return config


def log_start(engine: Engine, name: str, bind: Bind) -> None:
    """Log what is served, how it is compressed, and who may use it."""
    logging.config.dictConfig(log_config())
    if int(PIL.__version__.partition(".")[0]) < SAFE_PILLOW:
        logger.warning(
            "Pillow %s reads the EXIF data of an image without a bound: a file of 1 MB can take "
            "gigabytes of memory. Install pillow>=%d (Python 3.11), or serve trusted clients only.",
            PIL.__version__, SAFE_PILLOW,
        )  # fmt: skip
    model, options, default = engine.model, engine.options, engine.options.default
    logger.info(
        "serving %r (%s) on %s in %s: reducer %s, ratio %s, merge %s, ratio of requests %s, by "
        "load %s",
        name, type(model).__name__, model.device, str(model.dtype).removeprefix("torch."),
        default.describe().get("reducer"), default.shown_ratio,
        default.options_in_force["merge"],
        f"up to {options.max_ratio:g}" if options.per_request else "fixed",
        ", ".join(f"{r:g} from {n} visual tokens" for r, n in options.ratio_by_load) or "off",
    )  # fmt: skip
    named = bind.loopback or bind.allowed_hosts
    logger.info(
        "API key %s; host names %s; shutdown within %d s",
        "on" if bind.api_key else "off",
        ", ".join(("localhost", *bind.allowed_hosts)) if named else "all", bind.shutdown_timeout,
    )  # fmt: skip
