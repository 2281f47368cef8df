"""What a request needs before its body is read, and what happens to slow clients."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import logging
import shlex
import socket
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("starlette")
from starlette.testclient import TestClient
from support.serving import http
from support.serving.prompts import ANY_TEXT

import tokencomp
from tokencomp.serving.bind import Bind
from tokencomp.serving.hf import app as server
from tokencomp.serving.hf import prompt
from tokencomp.serving.hf.app import build_app
from tokencomp.serving.hf.fields import read_request
from tokencomp.serving.hf.metrics import Metrics
from tokencomp.serving.hf.queue import Waiting
from tokencomp.serving.limits import Limits, RequestError
from tokencomp.serving.spec import ServerOptions

CHAT = "/v1/chat/completions"
NAMES = ("testserver",)  # what the test client calls the server


def stub(**more: Any) -> Any:
    """Return an engine for the API that never runs."""
    options = ServerOptions.parse({"ratio": 0.5}, "hf")
    attributes = dict(metrics=Metrics(), options=options, max_model_len=8, healthy=True, text=None)
    attributes |= dict(close=lambda: None, check_room=lambda: None, grammars=None)
    return SimpleNamespace(**{**attributes, **more})


def client(engine: Any = None, limits: Limits | None = None, **bind: Any) -> Any:
    address = Bind(**{"allowed_hosts": NAMES, **bind})
    app = build_app(engine or stub(), "tiny", limits or Limits(), address)
    return TestClient(app, raise_server_exceptions=False)


def error(answer: Any) -> dict[str, Any]:
    """Return the error of an answer, which must have the form of OpenAI's API."""
    assert set(answer.json()) == {"error"}
    content = answer.json()["error"]
    assert set(content) == {"message", "type", "param", "code"}
    assert content["code"] == answer.status_code and content["message"]
    return content


def test_the_api_key_is_required() -> None:
    app = client(api_key="sécret")
    headers = ["", "Bearer wrong", "sécret", "Basic sécret", "Bearer sécret2", "Bearer"]
    for value in headers:
        header = {"authorization": value.encode()} if value else {}
        for answer in (app.get("/v1/models", headers=header), app.post(CHAT, headers=header)):
            assert answer.status_code == 401 and "API key" in error(answer)["message"]
            assert answer.headers["www-authenticate"] == "Bearer"
    for scheme in ("Bearer", "bearer", "BEARER"):
        header = {"authorization": f"{scheme} sécret".encode()}
        assert app.get("/v1/models", headers=header).json()["data"][0]["id"] == "tiny"
        assert app.post(CHAT, headers=header, json={}).status_code == 400
    assert app.get("/health").status_code == app.get("/metrics").status_code == 200
    for route in app.app.app.routes:  # only these two, and no path that a later version adds
        if route.path not in ("/health", "/ping", "/metrics"):
            for method in route.methods:
                assert app.request(method, route.path).status_code == 401, route.path
    assert app.post("/health").status_code == app.get("/nothing").status_code == 401


def test_pages_of_other_sites_may_ask_where_a_key_is_needed() -> None:
    """A browser asks first (CORS), without the key; where none is needed, no page may ask."""
    asked = {"origin": "https://page.example", "access-control-request-method": "POST"}
    asked["access-control-request-headers"] = "authorization,content-type"
    keyed, free = client(api_key="secret"), client()
    answer = keyed.options(CHAT, headers=asked)
    assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == "*"
    assert "authorization" in answer.headers["access-control-allow-headers"]
    key = {"authorization": "Bearer secret", "origin": "https://page.example"}
    models = keyed.get("/v1/models", headers=key)
    assert models.status_code == 200 and models.headers["access-control-allow-origin"] == "*"
    assert keyed.options(CHAT).status_code == 401  # no preflight
    assert keyed.options(CHAT, headers={**asked, "host": "x.example"}).status_code == 403
    assert not {"access-control-allow-origin"} & {*free.options(CHAT, headers=asked).headers}


def test_other_spellings_of_a_path_need_the_key_too() -> None:
    app = client(api_key="secret")
    for path in ("/%76%31/models", "/v1/%6dodels", "/v1/models/", "/v1//models"):
        assert app.get(path, follow_redirects=False).status_code == 401, path
    for path in ("//v1/models", "/V1/models", "/x/../v1/models", "/health/..%2fv1/models"):
        assert app.get(path).status_code in (401, 404), path


def test_other_content_types_are_refused() -> None:
    """A web page can send these to a server on the machine of its visitor, without permission."""
    app = client()
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""):
        answer = app.post(CHAT, content="{}", headers={"content-type": kind})
        assert answer.status_code == 415 and "application/json" in error(answer)["message"]
    for kind in ("application/json", "Application/JSON; charset=utf-8"):
        assert app.post(CHAT, content="{}", headers={"content-type": kind}).status_code == 400


@pytest.mark.parametrize(
    ("bind", "good", "bad"),
    [
        (Bind(), ["localhost:8000", "127.0.0.1", "[::1]:1"], ["evil.example:8000", "[", "a@b:c"]),
        (Bind(allowed_hosts=("ai.example",)), ["ai.example", "AI.example:80"], ["x.ai.example"]),
        (Bind("0.0.0.0"), ["any.example"], []),
        (Bind("0.0.0.0", allowed_hosts=("a.example",)), ["a.example", "192.0.2.1"], ["b.example"]),
    ],
)  # fmt: skip
def test_host_names(bind: Bind, good: list[str], bad: list[str]) -> None:
    app = TestClient(build_app(stub(), "tiny", Limits(), bind))
    for names, status in ((good, 200), (bad, 403)):
        for name in names:
            answer = app.get("/v1/models", headers={"host": name})
            assert answer.status_code == status, name
            assert status == 200 or "--allowed-host" in error(answer)["message"]


def test_every_failure_has_an_openai_body() -> None:
    def full() -> None:
        raise RequestError("busy", 503)

    def broken() -> None:
        raise OSError("/secret/path")

    assert client().get("/nothing").status_code == error(client().get("/nothing"))["code"] == 404
    assert error(client().get(CHAT))["code"] == 405
    busy = client(stub(check_room=full)).post(CHAT, json={})
    assert error(busy)["code"] == 503 and int(busy.headers["retry-after"]) > 0
    failed = client(stub(check_room=broken)).post(CHAT, json={})
    assert error(failed)["code"] == 500 and "secret" not in failed.text


def test_the_server_says_what_it_is() -> None:
    app = client(api_key="secret")
    key = {"authorization": "Bearer secret"}
    assert app.get("/ping").status_code == 200
    assert app.get("/version", headers=key).json() == {"version": tokencomp.__version__}
    (card,) = app.get("/v1/models", headers=key).json()["data"]
    assert app.get("/v1/models/tiny", headers=key).json() == card
    assert (
        "'a/b': this server has 'tiny'" in error(app.get("/v1/models/a/b", headers=key))["message"]
    )
    page = app.get("/", headers=key).text
    assert "tiny" in page and '"ratio": 0.5' in page and "kcenter" in page
    words = shlex.split(page.splitlines()[-1])
    assert words[1] == "http://testserver/v1/chat/completions"
    read_request(words[-1].encode())
    assert app.get("/docs", headers=key).status_code == 404
    assert app.get("/openapi.json", headers=key).status_code == 404


def test_bodies_are_bounded_one_by_one_and_together() -> None:
    limits = Limits(max_body=1000, max_bodies=1500)
    app = client(limits=limits)
    header = {"content-type": "application/json"}
    for content in ("x" * 1001, iter([b"x" * 600] * 2)):
        assert error(app.post(CHAT, content=content, headers=header))["code"] == 413
    large = app.post(CHAT, content="x" * 1001, headers=header)
    assert large.headers["connection"] == "close"  # the rest of the body is not read
    bodies = app.app.app.routes[-1].endpoint.__self__.bodies
    assert bodies.used == 0
    bodies.used = 1000
    assert error(app.post(CHAT, content="x" * 600, headers=header))["code"] == 503
    assert error(app.post(CHAT, content="x" * 400, headers=header))["code"] == 400
    assert bodies.used == 1000


def test_a_text_does_not_wait_for_the_media_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """More requests than may decode at a time, none of which ends before the text is answered."""
    gate, decoding = threading.Event(), []
    monkeypatch.setattr(prompt, "_load", lambda *a: decoding.append(1) or gate.wait(20))
    submitted = lambda *jobs: (_ for _ in ()).throw(RequestError("submitted", 418))  # noqa: E731
    media = {"messages": http.messages("What?", http.image_url(1, 8, 8))}
    engine = stub(text=ANY_TEXT, tokenizer=None, submit=submitted)
    with client(engine) as app, concurrent.futures.ThreadPoolExecutor(6) as pool:
        others = [pool.submit(app.post, CHAT, json=media) for _ in range(6)]
        while len(decoding) < 4:
            time.sleep(0.01)
        answer = app.post(CHAT, json={"messages": http.messages("Hello")})
        assert answer.status_code == 418 and not any(job.done() for job in others)
        gate.set()


def test_requests_are_logged_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    engine = stub()
    app = client(engine)
    with caplog.at_level(logging.INFO, "tokencomp.serving"):
        app.get("/health")
        assert not caplog.records
        own = app.get("/v1/models", headers={"x-request-id": "job-7"})
        other = app.post(CHAT, json={}, headers={"x-request-id": "two\twords"})
    assert own.headers["x-request-id"] == "job-7"
    first, second = (record.getMessage() for record in caplog.records)
    assert "GET /v1/models 200" in first and first.endswith("id=job-7")
    assert "POST /v1/chat/completions 400" in second
    assert other.headers["x-request-id"] in second and "words" not in second
    counted = engine.metrics.requests.collect()[0].samples
    counts = {s.labels["status"]: s.value for s in counted if s.name.endswith("_total")}
    assert counts == {"200": 1, "400": 1}


def test_the_log_has_the_reason_of_a_refusal_and_bounds_what_clients_wrote(
    caplog: pytest.LogCaptureFixture,
) -> None:
    app = client(api_key="secret")
    key = {"authorization": "Bearer secret"}
    with caplog.at_level(logging.INFO, "tokencomp.serving"):
        app.request("X" * 60_000, "/v1/models")
        app.post(CHAT, json={"messages": [], "top_k": 5}, headers=key)
        app.post(CHAT, json={"messages": [{"role": "user\n" * 10**4}]}, headers=key)
    key_missing, no_message, long = (record.getMessage() for record in caplog.records)
    assert " 401 " in key_missing and "reason='missing or wrong API key" in key_missing
    assert "reason='messages: List should have at least 1 item" in no_message
    assert all(len(line) < 500 and "\n" not in line for line in (key_missing, no_message, long))


@pytest.mark.parametrize(("version", "warned"), [("12.3.0", True), ("13.0.0", False)])
def test_a_pillow_without_a_bound_is_named_at_the_start(
    version: str, warned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    for name in ("warning", "info"):
        monkeypatch.setattr(server.logger, name, lambda text, *a: lines.append(text % a))
    monkeypatch.setattr(server.logging.config, "dictConfig", lambda config: None)
    monkeypatch.setattr(server.PIL, "__version__", version)
    model = SimpleNamespace(device="cpu", dtype="torch.float32")
    server.log_start(stub(model=model, waiting=Waiting()), "tiny", Limits(), Bind())
    assert any("pillow>=13" in line for line in lines) == warned


@contextlib.contextmanager
def running(app: Any, **bind: Any) -> Iterator[tuple[str, int]]:
    """Serve an application with uvicorn on a real socket; on leaving, it must end by itself."""
    address = Bind(port=http.free_port(), **bind)
    process = server.uvicorn_server(app, address)
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


HEAD = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


def received(connection: socket.socket) -> bytes:
    """Return everything that arrives until the server closes the connection."""
    connection.settimeout(15)
    result = b""
    while piece := connection.recv(4096):
        result += piece
    return result


def chunks(content: bytes, size: int) -> bytes:
    """Return a body in chunks of `size` bytes."""
    pieces = [content[i : i + size] for i in range(0, len(content), size)]
    return b"".join(b"%x\r\n%s\r\n" % (len(p), p) for p in pieces) + b"0\r\n\r\n"


def test_a_body_of_many_small_chunks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk of one byte costs as much as one of a megabyte: 6 seconds per megabyte."""
    head = (HEAD + "Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n").encode()
    errors: list[Any] = []
    log = logging.getLogger("uvicorn.error")
    monkeypatch.setattr(log, "error", lambda *words, **options: errors.append(words))
    with running(build_app(stub(), "tiny", Limits())) as address:
        with socket.create_connection(address) as connection:  # also where nobody reads the body
            small = head.replace(f"POST {CHAT}".encode(), b"GET /health")
            with contextlib.suppress(OSError):
                connection.sendall(small + chunks(b" " * 10**5, 1))
            with contextlib.suppress(ConnectionResetError):
                assert received(connection).startswith(b"HTTP/1.1 400 ")
        for content, size, answer in (
            (b" " * 10**5, 1, b"Invalid HTTP request"),
            (b" " * 10**5, 2, b"Invalid HTTP request"),
            (b" " * 10**6, 200, b"body: "),
            (b" " * 4000, 1, b"body: "),
        ):
            with socket.create_connection(address) as connection:
                with contextlib.suppress(OSError):  # closed before everything was sent
                    connection.sendall(head + chunks(content, size))
                with contextlib.suppress(ConnectionResetError):
                    whole = received(connection)
                    assert whole.startswith(b"HTTP/1.1 400 ") and answer in whole
        assert http.get("http://{}:{}/health".format(*address))[0] == 200
    assert not errors


@pytest.mark.parametrize("path", [CHAT, "/health"])
def test_a_body_with_two_lengths_ends_the_connection(path: str) -> None:
    """A proxy that believes the other header takes the rest for another client's request."""
    hidden = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n"
    head = HEAD.replace(CHAT, path).encode()
    for length in (4, len(hidden) + 5):
        lengths = b"Content-Length: %d\r\nTransfer-Encoding: chunked\r\n\r\n" % length
        with (
            running(build_app(stub(), "tiny", Limits())) as address,
            socket.create_connection(address) as connection,
        ):
            connection.sendall(head + lengths + b"0\r\n\r\n" + hidden)
            answers = received(connection)
        assert answers.startswith(b"HTTP/1.1 400 ") and answers.count(b"HTTP/1.1 ") == 1


def test_a_request_that_waited_behind_another_is_not_disconnected(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(server, "HEAD_SECONDS", 0.3)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            await asyncio.sleep(0.8 if scope["path"] == "/slow" else 0)
            await send({"type": "http.response.start", "status": 204, "headers": []})
            await send({"type": "http.response.body"})

    with running(app) as address, socket.create_connection(address) as connection:
        for path in ("/", "/slow"):
            connection.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        assert received(connection).count(b"HTTP/1.1 204 ") == 2


def test_slow_clients_are_disconnected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "HEAD_SECONDS", 0.5)
    app = build_app(stub(), "tiny", Limits(body_seconds=0.5), Bind())
    with running(app) as address, contextlib.ExitStack() as stack:
        silent, half_head, half_body, second = (
            stack.enter_context(socket.create_connection(address)) for _ in range(4)
        )
        half_head.sendall(HEAD.encode())
        half_body.sendall((HEAD + "Content-Length: 9\r\n\r\n{").encode())
        second.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\nGET ")
        assert received(silent) == received(half_head) == b""
        assert b" 408 " in received(half_body)
        assert received(second).startswith(b"HTTP/1.1 200 ")
        assert http.get("http://{}:{}/health".format(*address))[0] == 200


def test_heads_and_connections_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "MAX_CONNECTIONS", 4)
    get = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"
    with running(build_app(stub(), "tiny", Limits(), Bind())) as address:
        for flood in (b"".join(b"x-%d: y\r\n" % i for i in range(20_000)), b"x: " + b"y" * 10**6):
            with socket.create_connection(address) as connection:
                with contextlib.suppress(OSError):  # closed before everything was sent
                    connection.sendall(get + flood)
                with contextlib.suppress(ConnectionResetError):
                    assert received(connection)[:13] in (b"HTTP/1.1 400 ", b"")
        with contextlib.ExitStack() as stack:
            idle = [stack.enter_context(socket.create_connection(address)) for _ in range(4)]
            # Connections are accepted in order: when this one is served, all four are open.
            idle[-1].sendall(get + b"\r\n")
            assert idle[-1].recv(13) == b"HTTP/1.1 503 "
        end = time.monotonic() + 20
        while http.get("http://{}:{}/health".format(*address))[0] == 503:  # not all closed yet
            assert time.monotonic() < end
        assert http.get("http://{}:{}/health".format(*address))[0] == 200


def test_a_half_body_does_not_delay_the_shutdown() -> None:
    with running(build_app(stub(), "tiny", Limits()), shutdown_timeout=1) as address:
        connection = socket.create_connection(address)
        connection.sendall((HEAD + "Content-Length: 9\r\n\r\n{").encode())
        with socket.create_connection(address) as other:  # served in order: the first one is open
            other.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert other.recv(13) == b"HTTP/1.1 200 "
    assert b" 503 " in received(connection)
    connection.close()


@pytest.mark.parametrize("endless", [True, False])
def test_clients_that_do_not_read_are_disconnected(
    endless: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "SEND_SECONDS", 0.3)
    ended = threading.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        try:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            piece = {"type": "http.response.body", "body": b"x" * 10**7, "more_body": endless}
            await send(piece)
            while (await receive())["type"] != "http.disconnect":
                await send(piece)
        finally:
            ended.set()

    with running(app) as address, socket.create_connection(address) as connection:
        connection.sendall(b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert ended.wait(10)
        with contextlib.suppress(ConnectionResetError):
            received(connection)
