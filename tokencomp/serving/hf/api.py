"""The HTTP application: its routes, and OpenAI's chat completions."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from anyio import CapacityLimiter, to_thread
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from tokencomp import __version__
from tokencomp.serving.bind import Bind
from tokencomp.serving.hf.completion import Completion
from tokencomp.serving.hf.deadline import Deadline
from tokencomp.serving.hf.engine import Engine
from tokencomp.serving.hf.errors import CLIENT_LEFT, RequestError
from tokencomp.serving.hf.guard import Guard
from tokencomp.serving.hf.job import Event
from tokencomp.serving.hf.media import Limits
from tokencomp.serving.hf.prompt import Prompt, load, parse
from tokencomp.serving.hf.schema import ChatRequest
from tokencomp.serving.http import Bodies, error_response, first_page

# Of the request's schema in the description of the API, for references inside of it.
PLACE = "~1v1~1chat~1completions/post/requestBody/content/application~1json/schema"
READING = DECODING = 4  # requests whose text is read, and whose media are decoded, at one time
POLL = 0.5  # seconds between checks whether the client is still connected


def build_app(
    engine: Engine, name: str, limits: Limits, bind: Bind | None = None, docs: bool = False
) -> ASGIApp:
    """Build the application, which closes the engine at its end.

    Without `bind`, clients may use any name and need no key. With `docs`, `/docs` and
    `/openapi.json` describe the API.
    """

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(engine.close)

    bind = bind or Bind(host="")
    schema = "/openapi.json" if docs else None
    app = FastAPI(title="tokencomp", version=__version__, openapi_url=schema, lifespan=lifespan)
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
        app.add_api_route(path, handler, include_in_schema=path.startswith("/v1"))
    form = ChatRequest.model_json_schema(ref_template=f"#/paths/{PLACE}/$defs/{{model}}")
    body = {"requestBody": {"content": {"application/json": {"schema": form}}}}
    app.add_api_route("/v1/chat/completions", server.chat, methods=["POST"], openapi_extra=body)
    for kind in (RequestError, HTTPException, Exception):
        app.add_exception_handler(kind, _failed)
    if bind.api_key:  # a page of any site needs the key; without one, it could use the server
        app.add_middleware(
            CORSMiddleware, allow_origins=["*"], allow_methods=["*"], allow_headers=["*"]
        )
    return Guard(app, bind, engine.metrics)


class Server:
    """The handlers of all routes; `keyed`: whether requests need a key."""

    def __init__(self, engine: Engine, name: str, limits: Limits, keyed: bool = False) -> None:
        self.engine, self.name, self.limits, self.keyed = engine, name, limits, keyed
        self.started = int(time.time())
        self.bodies = Bodies(limits.max_body, limits.max_bodies, limits.body_seconds)
        self.reading, self.decoding = CapacityLimiter(READING), CapacityLimiter(DECODING)

    async def chat(self, request: Request) -> Response:
        """Answer a chat completion, whole or as a stream of events.

        The first event is awaited before the response starts, so that errors of the prefill still
        have an HTTP status.
        """
        self.engine.check_room()  # refuses early, before the body is read and media are decoded
        prompt = await self._prompt(request)
        body = prompt.request
        self._check_name(body.model or self.name)
        identity = {
            "id": f"chatcmpl-{request.state.request_id}",  # the log names the same id
            "created": int(time.time()),
            "model": self.name,
        }
        completion = Completion(prompt, self.engine.tokenizer, identity)
        request.state.completion = completion
        self.engine.submit(*completion.jobs)

        async def next_event() -> Event:
            return await _while_connected(request, completion.events.get(), completion.cancel)

        try:
            _, kind, value = await next_event()
            if kind == "error":
                raise value
            if body.stream:
                return StreamingResponse(completion.stream(), media_type="text/event-stream")
            return JSONResponse(await completion.whole(next_event))
        except RequestError:
            completion.cancel()  # the other answers
            raise

    async def _prompt(self, request: Request) -> Prompt:
        """Read and check a request, and decode its media as long as the client is there.

        Requests without media do not wait for the media of others.
        """
        engine, deadline = self.engine, Deadline(self.limits.decode_seconds)
        async with self.bodies.read(request) as body:
            prompt = await to_thread.run_sync(
                parse, body, engine.options, self.limits, engine.text, engine.grammars,
                limiter=self.reading,
            )  # fmt: skip
            if prompt.request.media:
                work = to_thread.run_sync(
                    load, prompt, engine.text, deadline, limiter=self.decoding
                )
                await _while_connected(request, work, deadline.cancel)
            return prompt

    async def health(self) -> Response:
        """Answer 200 while the engine answers requests, and 503 after it has failed."""
        return Response(status_code=200 if self.engine.healthy else 503)

    async def metrics(self) -> Response:
        """Answer with all metrics in the text format of Prometheus."""
        text = generate_latest(self.engine.metrics.registry)
        return Response(text, media_type=CONTENT_TYPE_LATEST)

    async def version(self) -> Any:
        """Answer with the version of this package."""
        return {"version": __version__}

    async def models(self) -> Any:
        """List the served model."""
        return {"object": "list", "data": [await self.model(self.name)]}

    async def model(self, name: str) -> Any:
        """Describe the served model with its default reducer and ratio."""
        self._check_name(name)
        return {
            "id": self.name,
            "object": "model",
            "created": self.started,
            "owned_by": "tokencomp",
            "max_model_len": self.engine.max_model_len,
            "tokencomp": self.engine.options.default.describe(),
        }

    async def page(self, request: Request) -> Response:
        """Say in plain text what is served, and how to ask."""
        return first_page(request, self.name, self.engine.options.default.describe(), self.keyed)

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
        error = RequestError(
            f"{error.detail}: {request.method} {request.url.path}", error.status_code
        )
    elif not isinstance(error, RequestError):
        error = RequestError("the server failed on this request.", 500)
    request.state.refusal = str(error)
    return error_response(error)
