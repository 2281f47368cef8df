"""Both servers as `tokencomp serve` makes them, around an engine that answers `REACHED`."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import httpx

from support.serving.prompts import ANY_TEXT
from tokencomp.serving import ENV_OPTIONS, ENV_RULES
from tokencomp.serving.bind import Bind
from tokencomp.serving.hf.app import build_app
from tokencomp.serving.hf.metrics import Metrics
from tokencomp.serving.limits import Limits, RequestError
from tokencomp.serving.router import Router
from tokencomp.serving.spec import ServerOptions
from tokencomp.serving.vllm.middleware import VllmGuard
from tokencomp.serving.vllm.roles import ENV_ROUTER_KEY
from tokencomp.serving.vllm.rules import Rules

CHAT = "/v1/chat/completions"
REACHED = 418  # status of a request that nothing has refused
Headers = Sequence[tuple[str, str]]


def engine(options: Any = None, **more: Any) -> Any:
    """Return what stands in for the engine on transformers."""

    def submit(*jobs: Any) -> None:
        raise RequestError("reached", REACHED)

    parsed = ServerOptions.parse({"ratio": 0.5} if options is None else options, "hf")
    attributes = dict(
        metrics=Metrics(), options=parsed, max_model_len=8, healthy=True, text=ANY_TEXT,
        tokenizer=None, grammars=None, close=lambda: None, check_room=lambda: None, submit=submit,
    )  # fmt: skip
    return SimpleNamespace(**{**attributes, **more})


def hf(limits: Limits | None = None, options: Any = None, **bind: Any) -> Any:
    """Return the server on transformers."""
    address = Bind(**{"host": "", **bind})
    return build_app(engine(options), "tiny", limits or Limits(), address)


class Vllm:
    """Stands in for vLLM: it reads a body and answers, or fails before or after its first word."""

    def __init__(self, error: Exception | None = None, late: bool = False) -> None:
        self.error, self.late, self.status = error, late, REACHED
        self.seen: list[bytes] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["method"] == "POST":
            self.seen.append((await receive())["body"])
        if self.error is not None and not self.late:
            raise self.error
        await send({"type": "http.response.start", "status": self.status, "headers": []})
        if self.error is not None:
            raise self.error
        await send({"type": "http.response.body", "body": b""})


class Healthy(Vllm):
    """The same, for a router that asks for its health."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.status = 200 if scope["path"] == "/health" else REACHED
        await super().__call__(scope, receive, send)


def vllm(
    limits: Limits | None = None, options: Any = None, app: Any = None, rules: Any = (), **bind: Any
) -> VllmGuard:
    """Return the middleware before vLLM, which reads its rules from the environment."""
    address = Bind(**{"host": "", **bind})
    written = Rules(address, limits or Limits(), **dict(rules)).as_json()
    env = {ENV_RULES: written, ENV_OPTIONS: json.dumps({"ratio": 0.5} | (options or {}))}
    if address.api_key:
        env["VLLM_API_KEY"] = address.api_key
    env[ENV_ROUTER_KEY] = dict(rules).get("router_key", "")
    with mock.patch.dict(os.environ, env):
        return VllmGuard(app or Vllm())


ROUTER_KEY = "the router's"


def router(limits: Limits | None = None, options: Any = None, **bind: Any) -> Router:
    """Return a router before that middleware, as prefill and decode."""
    usual = Limits()  # the router adds fields to a body
    inside = replace(limits or usual, max_body=usual.max_body, max_bodies=usual.max_bodies)
    node = vllm(
        inside, options, Healthy(), rules={"router_key": ROUTER_KEY}, api_key=bind.get("api_key")
    )
    address = Bind(**{"host": "", **bind})
    result = Router(["http://prefill"], ["http://decode"], ROUTER_KEY, address, limits)
    result.client = httpx.AsyncClient(transport=httpx.ASGITransport(node))
    return result


@dataclass
class Answer:
    """The answer of a server."""

    status: int
    headers: dict[str, str]
    content: bytes

    @property
    def message(self) -> str:
        """The message of an error, which must have the form of OpenAI's API."""
        error = json.loads(self.content)["error"]
        assert set(error) == {"message", "type", "param", "code"} and error["message"]
        assert error["code"] == self.status
        return str(error["message"])


async def through(
    app: Any,
    body: Any = b"",
    path: str = CHAT,
    method: str = "POST",
    headers: Headers = (),
    root: str = "",
) -> Answer:
    """Send a body in two pieces, an object as JSON; None never arrives. Return the answer."""
    content = json.dumps(body) if isinstance(body, dict) else body
    content = content.encode() if isinstance(content, str) else content
    half = 0 if content is None else len(content) // 2
    pieces = [] if content is None else [content[:half], content[half:]]
    sent: list[Any] = []

    async def receive() -> Any:
        if not pieces:
            await asyncio.sleep(60)
        return {"type": "http.request", "body": pieces.pop(0), "more_body": bool(pieces)}

    async def send(message: Any) -> None:
        sent.append(message)

    given = {name for name, _ in headers}
    length = "content-length", str(len(content or b"never"))
    usual = [("content-type", "application/json")] if "content-type" not in given else []
    usual += [length] if not given & {"transfer-encoding", "content-length"} else []
    every = [(n.encode(), v.encode()) for n, v in [*usual, *headers]]
    scope = {
        "type": "http", "method": method, "path": path, "headers": every, "root_path": root,
        "query_string": b"", "scheme": "http", "server": ("testserver", 80), "state": {},
        "client": ("127.0.0.1", 1234),
    }  # fmt: skip
    await asyncio.wait_for(app(scope, receive, send), 20)
    names = {n.decode().lower(): v.decode() for n, v in sent[0]["headers"]}
    return Answer(sent[0]["status"], names, b"".join(m.get("body", b"") for m in sent))


def ask(app: Any, body: Any = b"", *args: Any, **kwargs: Any) -> Answer:
    """Return the answer of an application to one request, see `through`."""
    return asyncio.run(through(app, body, *args, **kwargs))


def user(*parts: Any, **more: Any) -> dict[str, Any]:
    """Return a request of one message; a single text is its content."""
    content = parts[0] if len(parts) == 1 and isinstance(parts[0], str) else list(parts)
    return {"messages": [{"role": "user", "content": content}], **more}


def part(url: Any, kind: str = "", **more: Any) -> dict[str, Any]:
    """Return an image, or a video, of a message."""
    kind = kind or ("video_url" if str(url).lower().startswith("data:video") else "image_url")
    return {"type": kind, kind: {"url": url, **more}}
