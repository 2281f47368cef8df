"""Routes, log and sockets of the server on transformers, and what happens to slow clients."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any
from unittest.mock import Mock

import pytest

pytest.importorskip("starlette")
from support.serving import doors, http
from support.serving.doors import CHAT, ask, user

from tokencomp.serving import connections
from tokencomp.serving.bind import Bind
from tokencomp.serving.hf import app as server
from tokencomp.serving.hf.app import build_app
from tokencomp.serving.limits import Limits, RequestError

KEY = ("authorization", "Bearer secret")


def test_pages_of_other_sites_may_ask_where_a_key_is_needed() -> None:
    """A browser asks first (CORS), without the key; where none is needed, no page may ask."""
    asked = [("origin", "https://page.example"), ("access-control-request-method", "POST")]
    asked.append(("access-control-request-headers", "authorization,content-type"))
    keyed, free = doors.hf(api_key="secret"), doors.hf()
    answer = ask(keyed, None, CHAT, "OPTIONS", asked)
    assert answer.status == 200 and answer.headers["access-control-allow-origin"] == "*"
    assert "authorization" in answer.headers["access-control-allow-headers"]
    models = ask(keyed, path="/v1/models", method="GET", headers=[KEY, asked[0]])
    assert models.status == 200 and models.headers["access-control-allow-origin"] == "*"
    assert "access-control-allow-origin" not in ask(free, None, CHAT, "OPTIONS", asked).headers


@pytest.mark.parametrize(
    ("path", "method", "room", "status"),
    [
        ("/nothing", "GET", None, 404), ("/docs", "GET", None, 404), (CHAT, "GET", None, 405),
        ("/v1/models/a/b", "GET", None, 404), (CHAT, "POST", RequestError("busy", 503), 503),
        (CHAT, "POST", OSError("/secret/path"), 500),
    ],
)  # fmt: skip
def test_every_failure_has_an_openai_body(path: str, method: str, room: Any, status: int) -> None:
    app = build_app(doors.engine(check_room=Mock(side_effect=room)), "tiny", Limits())

    async def run(*arguments: Any) -> None:
        with contextlib.suppress(OSError):  # Starlette raises what it has answered with 500
            await app(*arguments)

    answer = ask(run, user("a"), path, method)
    assert answer.status == status and "secret" not in answer.message
    assert status != 503 or int(answer.headers["retry-after"]) > 0


def test_requests_are_logged_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    """Log injection and flooding: a line has little of what clients wrote, and no line breaks."""
    engine = doors.engine()
    app = build_app(engine, "tiny", Limits(), Bind("", api_key="secret"))
    long = {"messages": [{"role": "user\n" * 10**4}]}
    with caplog.at_level(logging.INFO, "tokencomp.serving"):
        ask(app, path="/health", method="GET")
        assert not caplog.records
        own = ask(app, path="/v1/models", method="GET", headers=[KEY, ("x-request-id", "job-7")])
        other = ask(app, long, headers=[KEY, ("x-request-id", "two\twords")])
        ask(app, path="/v1/models/" + "x\n" * 10**4, method="GET", headers=[KEY])
        ask(app, path="/v1/models", method="X" * 60_000)
    assert own.headers["x-request-id"] == "job-7"
    first, second, named, third = (record.getMessage() for record in caplog.records)
    assert "GET /v1/models 200" in first and first.endswith("id=job-7")
    assert f"POST {CHAT} 400" in second and "reason=" in second
    assert other.headers["x-request-id"] in second and "words" not in second
    assert " 401 " in third and "reason=" in third
    lines = (first, second, named, third)
    assert all(len(line) < 500 and "\n" not in line for line in lines)
    counted = engine.metrics.requests.collect()[0].samples
    counts = {s.labels["status"]: s.value for s in counted if s.name.endswith("_total")}
    assert counts == {"200": 1, "400": 1, "401": 1, "404": 1}


# -- sockets --------------------------------------------------------------------------------------


@contextlib.contextmanager
def running(app: Any = None, protocol: Any = None, **bind: Any) -> Iterator[tuple[str, int]]:
    """Serve an application with uvicorn on a real socket; on leaving, it must end by itself."""
    address = Bind(port=http.free_port(), **bind)
    process = server.uvicorn_server(app or build_app(doors.engine(), "tiny", Limits()), address)
    process.config.http = protocol or process.config.http
    thread = threading.Thread(target=process.run, daemon=True)
    thread.start()
    while not process.started:
        time.sleep(0.02)
    try:
        yield address.host, address.port
    finally:
        process.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


GET = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"
HEAD = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n".encode()
CHUNKED = b"Transfer-Encoding: chunked\r\n"


def answers(address: tuple[str, int], *content: bytes) -> bytes:
    """Return everything that arrives until the server closes the connection.

    It is read while the content is sent: the server may answer and close before it has read all.
    """
    result = b""
    with socket.create_connection(address, timeout=15) as connection:

        def send() -> None:
            with contextlib.suppress(OSError):  # closed before everything was sent
                for piece in content:
                    connection.sendall(piece)

        sender = threading.Thread(target=send)
        sender.start()
        with contextlib.suppress(ConnectionResetError):
            while piece := connection.recv(4096):
                result += piece
        sender.join()
    return result


def healthy(address: tuple[str, int]) -> bool:
    return http.get("http://{}:{}/health".format(*address))[0] == 200


def chunks(count: int, size: int) -> bytes:
    """Return a body of spaces in chunks of `size` bytes."""
    return (b"%x\r\n%s\r\n" % (size, b" " * size)) * (count // size) + b"0\r\n\r\n"


PROTOCOLS = pytest.mark.parametrize(
    "protocol", [connections.BoundedH11, connections.Connection], ids=["hf", "vllm"]
)


@PROTOCOLS
def test_a_body_of_many_small_chunks_is_refused(
    protocol: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunk flood: one byte costs as much as a megabyte would, 6 seconds per megabyte."""
    errors: list[Any] = []
    log = logging.getLogger("uvicorn.error")
    monkeypatch.setattr(log, "error", lambda *words, **options: errors.append(words))
    with running(protocol=protocol) as address:
        refused, end = b"Invalid HTTP request", b"Connection: close\r\n\r\n"
        small = answers(address, GET + CHUNKED + end, chunks(10**5, 1))  # nobody reads the body
        # Refused while the body arrives, unless the answer came first.
        assert small.startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 200 "))
        for count, size, words in (
            (10**5, 1, refused), (10**5, 2, refused), (10**6, 200, b"body: "), (4000, 1, b"body: "),
        ):  # fmt: skip
            whole = answers(address, HEAD + CHUNKED + end, chunks(count, size))
            assert whole.startswith(b"HTTP/1.1 400 ") and words in whole
        assert healthy(address)
    assert not errors


def test_a_body_with_two_lengths_ends_the_connection() -> None:
    """Request smuggling: the rest must not be answered as another client's request."""
    hidden = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with running() as address:
        for length in (4, len(hidden) + 5):
            lengths = b"Content-Length: %d\r\n" % length + CHUNKED + b"\r\n"
            got = answers(address, HEAD + lengths + b"0\r\n\r\n" + hidden)
            assert got.startswith(b"HTTP/1.1 400 ") and got.count(b"HTTP/1.1 ") == 1


@PROTOCOLS
def test_slow_clients_are_disconnected(protocol: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slowloris: heads and bodies without an end. A request that waits for another one stays."""
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.5)
    app = build_app(doors.engine(), "tiny", Limits(body_seconds=0.5))

    async def slow(scope: Any, *arguments: Any) -> None:
        if scope["type"] == "http" and scope["path"] == "/version":
            await asyncio.sleep(1)
        await app(scope, *arguments)

    with running(slow, protocol) as address:
        assert answers(address) == answers(address, HEAD) == b""
        assert b" 408 " in answers(address, HEAD + b"Content-Length: 9\r\n\r\n{")
        half = answers(address, GET + b"\r\nGET ")
        assert half.startswith(b"HTTP/1.1 200 ") and half.count(b"HTTP/1.1 ") == 1
        waited = answers(address, GET + b"\r\n", GET.replace(b"health", b"version") + b"\r\n")
        assert waited.count(b"HTTP/1.1 200 ") == 2
        assert healthy(address)


@PROTOCOLS
def test_connections_are_bounded(protocol: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Connection flood: each connection takes a file descriptor of the process."""
    monkeypatch.setattr(protocol, "most", 4)
    with running(protocol=protocol) as address:
        with contextlib.ExitStack() as stack:
            idle = [stack.enter_context(socket.create_connection(address)) for _ in range(4)]
            # Connections are accepted in order: when this one is served, all four are open.
            idle[-1].sendall(GET + b"\r\n")
            assert idle[-1].recv(13) == b"HTTP/1.1 503 "
        end = time.monotonic() + 20
        while not healthy(address):  # not all closed yet
            assert time.monotonic() < end


@PROTOCOLS
def test_half_heads_close_each_other_and_no_request(protocol: Any) -> None:
    """Slowloris by 600 connections without a key: running and later requests are answered."""
    slow, begun = threading.Event(), threading.Event()
    usual = build_app(doors.engine(), "tiny", Limits(), Bind(api_key="secret"))

    async def app(scope: Any, *arguments: Any) -> None:
        if scope["type"] == "http" and scope["path"] == "/version":
            begun.set()
            await asyncio.to_thread(slow.wait, 20)
        await usual(scope, *arguments)

    with running(app, protocol) as address, contextlib.ExitStack() as stack:
        open_to = functools.partial(socket.create_connection, address, timeout=15)
        first = stack.enter_context(open_to())
        line = GET.replace(b"health", b"version")
        # The second of two that arrive together begins when the first has ended.
        first.sendall(GET + b"\r\n" + line + b"Authorization: Bearer secret\r\n\r\n")
        assert begun.wait(10)
        half = [stack.enter_context(open_to()) for _ in range(600)]
        for connection in half:
            with contextlib.suppress(OSError):
                connection.sendall(HEAD)
        assert healthy(address) and len(protocol.waiting) <= connections.MAX_WAITING
        for connection in half[: 600 - connections.MAX_WAITING - 1]:
            with contextlib.suppress(ConnectionResetError):
                assert connection.recv(1) == b""
        half[-1].sendall(b"Authorization: Bearer secret\r\nContent-Length: 2\r\n\r\n{}")
        assert half[-1].recv(13) == b"HTTP/1.1 400 "
        slow.set()
        got = b""
        while got.count(b"HTTP/1.1 200 ") < 2 and (piece := first.recv(4096)):
            got += piece
        assert got.count(b"HTTP/1.1 200 ") == 2
    end = time.monotonic() + 10
    while protocol.waiting:
        assert time.monotonic() < end


def test_a_half_body_does_not_delay_the_shutdown() -> None:
    """A client that never ends its body, while a supervisor waits for the end of the server."""
    with running(shutdown_timeout=1) as address:
        connection = socket.create_connection(address, timeout=15)
        connection.sendall(HEAD + b"Content-Length: 9\r\n\r\n{")
        with socket.create_connection(address) as other:  # served in order: the first one is open
            other.sendall(GET + b"\r\n")
            assert other.recv(13) == b"HTTP/1.1 200 "
    with connection:
        assert b" 503 " in connection.recv(4096)


@PROTOCOLS
@pytest.mark.parametrize("endless", [True, False])
def test_clients_that_do_not_read_are_disconnected(
    endless: bool, protocol: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slow read: answers that nobody takes stay in memory."""
    monkeypatch.setattr(connections, "SEND_SECONDS", 0.3)
    ended = threading.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "http"  # uvicorn also offers its start and end
        try:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            piece = {"type": "http.response.body", "body": b"x" * 10**7, "more_body": endless}
            await send(piece)
            while (await receive())["type"] != "http.disconnect":
                await send(piece)
        finally:
            ended.set()

    with running(app, protocol) as address, socket.create_connection(address) as connection:
        connection.sendall(GET + b"\r\n")
        assert ended.wait(10)


@PROTOCOLS
def test_a_client_that_reads_late_keeps_its_connection(
    protocol: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit of a slow read ends when the client has read; the next answer may take longer."""
    monkeypatch.setattr(connections, "SEND_SECONDS", 1.0)
    size, paused = 10**7, threading.Event()
    pause = protocol.pause_writing
    monkeypatch.setattr(protocol, "pause_writing", lambda self: pause(self) or paused.set())

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.sleep(2 * (scope["type"] == "http" and scope["path"] == "/slow"))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"x" * size})

    with running(app, protocol) as address, socket.create_connection(address) as connection:
        connection.sendall(GET + b"\r\n")
        assert paused.wait(10)
        got = 0
        while got < size and (piece := connection.recv(1 << 20)):
            got += len(piece)
        last = GET.replace(b"health", b"slow") + b"Connection: close\r\n\r\n"
        connection.sendall(last)
        rest = b""
        while piece := connection.recv(1 << 20):
            rest += piece
    assert rest.count(b"x") >= size
