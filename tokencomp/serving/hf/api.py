"""The HTTP routes: OpenAI's chat completions, health, models and metrics."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from anyio import CapacityLimiter, to_thread
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect

from tokencomp.serving.hf.answer import AnswerText
from tokencomp.serving.hf.engine import Engine
from tokencomp.serving.hf.errors import RequestError
from tokencomp.serving.hf.job import Job
from tokencomp.serving.hf.media import Limits
from tokencomp.serving.hf.prompt import Prompt, parse

DEFAULT_TOKENS = 256
DECODING = 4  # number of requests whose media are decoded at the same time
POLL = 0.5  # seconds between checks whether the client is still connected


def build_app(engine: Engine, name: str, limits: Limits, api_key: str | None = None) -> FastAPI:
    """Build the application.

    Parameters
    ----------
    engine
        The engine that answers requests; it is closed with the application.
    name
        Model name that clients see.
    limits
        Limits on the media of a request.
    api_key
        If not None, routes below `/v1` require it as a bearer token.
    """

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(engine.close)

    app = FastAPI(title="tokencomp", docs_url=None, redoc_url=None, lifespan=lifespan)
    server = Server(engine, name, limits, api_key)
    app.add_api_route("/health", server.health)
    app.add_api_route("/metrics", server.metrics)
    app.add_api_route("/v1/models", server.models)
    app.add_api_route("/v1/chat/completions", server.chat, methods=["POST"])
    app.add_exception_handler(RequestError, server.failed)
    return app


class Server:
    """The handlers of all routes."""

    def __init__(self, engine: Engine, name: str, limits: Limits, api_key: str | None) -> None:
        self.engine, self.name, self.limits, self.api_key = engine, name, limits, api_key
        self.started = int(time.time())
        self.decoding = CapacityLimiter(DECODING)

    async def health(self) -> Response:
        """Answer 200 while the engine runs, and 503 after it has failed."""
        return Response(status_code=200 if self.engine.alive else 503)

    async def metrics(self) -> Response:
        """Answer with all metrics in the text format of Prometheus."""
        text = generate_latest(self.engine.metrics.registry)
        return Response(text, media_type=CONTENT_TYPE_LATEST)

    async def models(self, request: Request) -> Any:
        """List the served model with its default reducer and ratio."""
        self._authorize(request)
        card = {
            "id": self.name,
            "object": "model",
            "created": self.started,
            "owned_by": "tokencomp",
            "max_model_len": self.engine.max_model_len,
            "tokencomp": self.engine.options.default.describe(),
        }
        return {"object": "list", "data": [card]}

    async def failed(self, request: Request, error: Any) -> Response:
        """Answer a `RequestError` in the form of OpenAI's API, and count it."""
        self.engine.metrics.requests.labels(error.status).inc()
        return JSONResponse(error.body(), status_code=error.status)

    async def chat(self, request: Request) -> Response:
        """Answer a chat completion, whole or as a stream of events.

        The first event is awaited before the response starts, so that errors of the prefill still
        have an HTTP status.
        """
        self._authorize(request)
        self.engine.check_room()  # refuses early, before media are decoded
        body = await self._body(request)
        prompt = await to_thread.run_sync(
            parse, body, self.engine.options, self.limits, self.engine.text, limiter=self.decoding
        )
        chat_request = prompt.request
        if chat_request.model not in ("", self.name):
            raise RequestError(f"model {chat_request.model!r}: this server has {self.name!r}.", 404)
        tokens = chat_request.max_completion_tokens or chat_request.max_tokens or DEFAULT_TOKENS
        text = AnswerText(self.engine.tokenizer, chat_request.stops)
        job = Job(prompt, asyncio.get_running_loop(), tokens, text)
        self.engine.submit(job)
        try:
            kind, value = await self._next(job, request)
        except asyncio.CancelledError:
            job.cancelled = True
            raise
        if kind == "error":
            raise value
        if chat_request.stream:
            stream = self._stream(job, prompt, _identity())
            return StreamingResponse(stream, media_type="text/event-stream")
        return await self._whole(job, request)

    # -- responses ------------------------------------------------------------------------------

    async def _whole(self, job: Job, request: Request) -> Response:
        """Collect all text of a job and answer with one JSON body."""
        text, finish = "", "length"
        while True:
            kind, value = await self._next(job, request)
            if kind == "error":
                raise value
            if kind == "end":
                finish = value
                break
            text += value
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": text},
            "finish_reason": finish,
        }
        self.engine.metrics.requests.labels(200).inc()
        usage = job.usage.as_dict() if job.usage else None
        body = {**_identity(), "object": "chat.completion", "model": self.name}
        return JSONResponse({**body, "choices": [choice], "usage": usage})

    async def _stream(
        self, job: Job, prompt: Prompt, identity: dict[str, Any]
    ) -> AsyncIterator[str]:
        """Yield the server-sent events of a job, which is cancelled if the client disconnects."""
        base = {**identity, "object": "chat.completion.chunk", "model": self.name}

        def chunk(delta: dict[str, Any], finish: str | None = None) -> str:
            choice = {"index": 0, "delta": delta, "finish_reason": finish}
            return _event({**base, "choices": [choice]})

        try:
            yield chunk({"role": "assistant", "content": ""})
            while True:
                kind, value = await job.events.get()
                if kind == "error":
                    yield _event(value.body())
                    break
                if kind == "end":
                    yield chunk({}, value)
                    break
                yield chunk({"content": value})
            options = prompt.request.stream_options
            if options is not None and options.include_usage and job.usage is not None:
                yield _event({**base, "choices": [], "usage": job.usage.as_dict()})
            self.engine.metrics.requests.labels(200).inc()
            yield "data: [DONE]\n\n"
        finally:
            job.cancelled = True  # the client has disconnected, or the answer is complete

    async def _next(self, job: Job, request: Request) -> tuple[str, Any]:
        """Return the next event of a job; cancel the job if the client disconnects."""
        while True:
            try:
                return await asyncio.wait_for(job.events.get(), POLL)
            except TimeoutError:
                pass
            except asyncio.TimeoutError:
                pass
            if await request.is_disconnected():
                job.cancelled = True
                raise RequestError("the client went away.", 499)

    # -- requests -------------------------------------------------------------------------------

    def _authorize(self, request: Request) -> None:
        """Require the API key, if there is one; the comparison takes constant time."""
        token = request.headers.get("authorization", "").removeprefix("Bearer ")
        if self.api_key and not hmac.compare_digest(token.encode(), self.api_key.encode()):
            raise RequestError("missing or wrong API key.", 401)

    async def _body(self, request: Request) -> bytes:
        """Read a body whose size is limited."""
        limit = self.limits.max_bytes * 2
        content = bytearray()
        try:
            async for piece in request.stream():
                content += piece
                if len(content) > limit:
                    raise RequestError(f"request bodies may have {limit} bytes.", 413)
        except ClientDisconnect:
            raise RequestError("the client went away.", 499) from None
        return bytes(content)


def _identity() -> dict[str, Any]:
    """Return id and creation time of a new completion."""
    return {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time())}


def _event(value: dict[str, Any]) -> str:
    """Format a server-sent event."""
    return f"data: {json.dumps(value)}\n\n"
