"""A router before prefills and decodes of vLLM (`tokencomp route`).

    client ──► router ──1──► prefill   the request with max_tokens 1; answers kv_transfer_params
                      ──2──► decode    the request with these; its answer is the client's

A decode can answer every request alone, with a prefill of its own. It is asked so where no prefill
can be reached, and where it answers 409 (`vllm.marks`) or 500: it could not read the blocks. Each
`kv_transfer_params` go to one decode, once.

Clients have no rights of a router: their bodies pass the checks that the servers have for ordinary
clients. The router's key goes to prefill and decode alone, with the client's key, address and
request id.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

import httpx
from anyio import to_thread
from prometheus_client import CONTENT_TYPE_LATEST, REGISTRY, Counter, generate_latest
from pydantic_core import from_json
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from tokencomp.errors import OptionError
from tokencomp.serving.bind import Bind
from tokencomp.serving.http import Bodies, Exchange, Guard, route
from tokencomp.serving.limits import Limits, RequestError
from tokencomp.serving.request import read_request
from tokencomp.serving.saved import process_metrics
from tokencomp.serving.vllm.request_checks import VllmChat
from tokencomp.serving.vllm.roles import KV_PARAMS, ROUTER_HEADER, check_sender

logger = logging.getLogger("tokencomp.serving")

CHAT = "/v1/chat/completions"
READ = ("/v1/models", "/version")  # a decode answers
ANSWER_SECONDS, HEALTH_SECONDS = 600.0, 2.0
PASSED = ("content-type", "retry-after", "allow", "vary")  # headers of an answer, and of CORS:
CORS = "access-control-"
MANY = httpx.Limits(max_connections=None, max_keepalive_connections=64)
HANDS_ON = {"do_remote_decode": True, "do_remote_prefill": False}
SHORT = {"max_tokens": 1, "n": 1, "stream": False, KV_PARAMS: HANDS_ON}
LONG = ("stream_options", "max_completion_tokens", "min_tokens")  # fields of the answer alone
ALONE = Counter(
    "tokencomp_router_decode_alone", "Requests that a decode answered without a prefill",
    ["reason"], registry=REGISTRY,
)  # fmt: skip


class Node:
    """A prefill or decode, and the number of its requests that run."""

    def __init__(self, url: str) -> None:
        try:
            parsed = httpx.URL(url.rstrip("/"))
        except httpx.InvalidURL:
            parsed = httpx.URL("")
        if parsed.scheme not in ("http", "https") or not parsed.host or parsed.query:
            raise OptionError(f"{url!r}: expected the address of a server: http://10.0.0.7:8100.")
        self.url, self.running = str(parsed), 0

    @contextlib.contextmanager
    def busy(self) -> Iterator[None]:
        self.running += 1
        try:
            yield
        finally:
            self.running -= 1


def by_load(nodes: Sequence[Node]) -> list[Node]:
    """Nodes in the order in which a request tries them."""
    return sorted(nodes, key=lambda node: node.running)


class Router(Guard):
    """ASGI application: one answer of a prefill and a decode; see the module's docstring.

    Parameters
    ----------
    prefills, decodes : sequence of str
        Addresses, such as ``http://10.0.0.7:8100``; the one with the fewest requests is asked.
    key : str
        The secret that prefill and decode have as ``TOKENCOMP_ROUTER_KEY``.
    bind : Bind
        Names of the router, and the key of its clients.
    limits : Limits, optional
        Of bodies; prefill and decode check the media.

    Raises
    ------
    OptionError
        If an address is none, there is no decode, or the key is missing or that of clients.
    """

    def __init__(
        self, prefills: Sequence[str], decodes: Sequence[str], key: str | None, bind: Bind,
        limits: Limits | None = None,
    ) -> None:  # fmt: skip
        if not key or key == bind.api_key:
            raise OptionError(
                "a router needs a secret that prefill and decode have and clients do not: set "
                "TOKENCOMP_ROUTER_KEY of all three to the same value (openssl rand -hex 32), "
                "another one than TOKENCOMP_API_KEY."
            )
        if not decodes:
            raise OptionError("a router needs at least one --decode URL.")
        super().__init__(self.other, bind, process_metrics(), logger)
        self.prefills, self.decodes = [*map(Node, prefills)], [*map(Node, decodes)]
        self.key, self.limits = key, limits or Limits()
        self.bodies = Bodies(self.limits)
        # Proxies in the environment are for other hosts: the key would go to them.
        self.client = httpx.AsyncClient(timeout=ANSWER_SECONDS, trust_env=False, limits=MANY)

    async def other(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Start and end of the server."""
        if scope["type"] != "lifespan":
            await send({"type": "websocket.close", "code": 1008, "reason": "no such path"})
            return
        while True:
            message = await receive()
            if message["type"] == "lifespan.shutdown":
                await self.client.aclose()
            await send({"type": message["type"] + ".complete"})
            if message["type"] == "lifespan.shutdown":
                return

    async def answer(self, exchange: Exchange) -> None:
        path, method = route(exchange.scope), exchange.scope["method"]
        reads = method in ("GET", "HEAD")
        if path == "/ping" and reads:
            answer: Response = Response()
        elif path == "/health" and reads:
            answer = await self._health()
        elif path == "/metrics" and reads:
            answer = Response(generate_latest(REGISTRY), media_type=CONTENT_TYPE_LATEST)
        elif method == "OPTIONS" or (reads and path.startswith(READ)):
            answer = await self._read(exchange)
        elif path == CHAT and method == "POST":
            answer = await self._chat(exchange)
        else:
            known = ", ".join(("/health", "/ping", "/metrics", CHAT, *READ))
            raise RequestError(f"no path {path!r}; this router has {known}.", 404)
        await answer(exchange.scope, exchange.receive, exchange.send)

    # -- the two requests --------------------------------------------------------------------------

    async def _chat(self, exchange: Exchange) -> Response:
        async with self.bodies.read(Request(exchange.scope, exchange.receive)) as content:
            body = await to_thread.run_sync(
                checked, content, self.limits, limiter=self.bodies.reading
            )
            answer, node = await self._answered(body, self._head(exchange))
        exchange.details = node.url
        exchange.ends.enter_context(node.busy())
        return StreamingResponse(_pieces(answer), answer.status_code, _passed(answer))

    def _head(self, exchange: Exchange) -> dict[bytes, bytes]:
        """The client's key, address and id, and the key of the router."""
        given = Request(exchange.scope).headers
        head = {
            name: value
            for name, value in given.items()
            if name in ("authorization", "origin") or name.startswith(CORS)
        }
        head["x-request-id"] = exchange.id
        head["x-forwarded-for"] = str((exchange.scope.get("client") or ("",))[0])
        # As bytes: Starlette reads headers as Latin-1, whatever the client has encoded.
        encoded = {n.encode(): v.encode("latin-1", "replace") for n, v in head.items()}
        return {**encoded, ROUTER_HEADER.encode(): self.key.encode()}

    async def _answered(
        self, body: dict[str, Any], head: dict[bytes, bytes]
    ) -> tuple[httpx.Response, Node]:
        """The answer of a decode as a stream, or what a prefill says in place of 200."""
        answer, node = await self._prefilled(body, head)
        if answer is not None and node is not None and answer.status_code != 200:
            return answer, node  # a decode would refuse the same
        if answer is None:
            reason = "no prefill"
        else:
            handed = {KV_PARAMS: from_json(await answer.aread()).get(KV_PARAMS)}
            # One decode alone: the prefill frees the blocks when a decode has read them.
            first = by_load(self.decodes)[0]
            try:
                answer = await self._send(first, body | handed, head)
                if answer.status_code not in (409, 500):
                    return answer, first
                reason = str(answer.status_code)
                await answer.aclose()
            except httpx.TransportError:
                reason = "lost"
        ALONE.labels(reason).inc()
        return await self._tried(self.decodes, body, head)

    async def _prefilled(
        self, body: dict[str, Any], head: dict[bytes, bytes]
    ) -> tuple[httpx.Response | None, Node | None]:
        """The answer of a prefill that can be reached and does not end; None without one."""
        short = {name: value for name, value in body.items() if name not in LONG} | SHORT
        try:
            answer, node = await self._tried(self.prefills, short, head)
        except RequestError:
            return None, None
        if answer.status_code == 500:
            await answer.aclose()
            return None, None
        return answer, node

    async def _tried(
        self, nodes: Sequence[Node], body: dict[str, Any], head: dict[bytes, bytes]
    ) -> tuple[httpx.Response, Node]:
        """The answer of the first node, by load, that can be reached and is not ending or full."""
        order = by_load(nodes)
        for node in order:
            try:
                answer = await self._send(node, body, head)
            except httpx.TransportError:
                continue
            if answer.status_code != 503 or node is order[-1]:
                return answer, node
            await answer.aclose()
        raise RequestError("no server can be reached, or it ended. Send the request again.", 502)

    async def _send(
        self, node: Node, body: dict[str, Any], head: dict[bytes, bytes]
    ) -> httpx.Response:
        request = self.client.build_request("POST", node.url + CHAT, json=body, headers=head)
        with node.busy():
            return await self.client.send(request, stream=True)

    # -- other paths -------------------------------------------------------------------------------

    async def _read(self, exchange: Exchange) -> Response:
        """What a decode answers to a request without a body."""
        path = route(exchange.scope)
        for node in by_load(self.decodes):
            with contextlib.suppress(httpx.TransportError):
                answer = await self.client.request(
                    exchange.scope["method"], node.url + path, headers=self._head(exchange)
                )
                return Response(answer.content, answer.status_code, _passed(answer))
        raise RequestError("no decode can be reached. Ask again.", 502)

    async def _health(self) -> Response:
        """How many of each role are healthy; 503 without a decode."""
        counts: dict[str, Any] = {}
        for role, nodes in (("prefill", self.prefills), ("decode", self.decodes)):
            found = await asyncio.gather(*(self._is_healthy(node) for node in nodes))
            counts[role] = {"healthy": sum(found), "all": len(nodes)}
        return JSONResponse(counts, 200 if counts["decode"]["healthy"] else 503)

    async def _is_healthy(self, node: Node) -> bool:
        try:
            answer = await self.client.get(node.url + "/health", timeout=HEALTH_SECONDS)
        except httpx.TransportError:
            return False
        return answer.status_code == 200


def checked(content: bytes | bytearray, limits: Limits) -> dict[str, Any]:
    """The JSON of a client, by the checks of a server for ordinary clients."""
    check_sender(read_request(VllmChat, content, limits).further, router=False)
    body: dict[str, Any] = from_json(content)
    return body


def _passed(answer: httpx.Response) -> dict[str, str]:
    """The headers of a node's answer that the client gets."""
    return {n: v for n, v in answer.headers.items() if n in PASSED or n.startswith(CORS)}


async def _pieces(answer: httpx.Response) -> AsyncIterator[bytes]:
    """The body of an answer; a client that leaves ends the request to the decode."""
    try:
        async for piece in answer.aiter_raw():
            yield piece
    finally:
        await answer.aclose()


def run_router(
    prefills: Sequence[str], decodes: Sequence[str], key: str | None, bind: Bind
) -> None:
    """Route until the process is interrupted; requests that run have `bind.shutdown_timeout`."""
    import logging.config

    from tokencomp.serving.hf.app import log_config, uvicorn_server

    router = Router(prefills, decodes, key, bind)
    bind.warn_if_open()
    sockets = [bind.take_port()]
    logging.config.dictConfig(log_config())
    for role, nodes in (("prefill", router.prefills), ("decode", router.decodes)):
        logger.info("%s: %s", role, ", ".join(node.url for node in nodes) or "none")
    uvicorn_server(router, bind).run(sockets)
