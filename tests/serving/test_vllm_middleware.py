"""The middleware before vLLM's routes: what it refuses, and what it answers for vLLM."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import Any

import pytest
from PIL.Image import DecompressionBombError

from tokencomp.serving.vllm.middleware import OwnOptionsOnly


async def through_middleware(
    body: bytes, limit: int = 10**6, error: Exception | None = None, late: bool = False
) -> tuple[int, bytes | None]:
    """Return the status, and the body that the application behind the middleware read.

    The body is None if the application was not called. The application raises `error`, and with
    `late` it does so after it has started its answer.
    """
    seen: list[bytes] = []
    status: list[int] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append((await receive())["body"])
        if error is not None and not late:
            raise error
        await send({"type": "http.response.start", "status": 200, "headers": []})
        if error is not None:
            raise error

    parts = [body[: len(body) // 2], body[len(body) // 2 :]]
    messages = [
        {"type": "http.request", "body": part, "more_body": more}
        for part, more in zip(parts, (True, False), strict=True)
    ]

    async def receive() -> Any:
        return messages.pop(0)

    async def send(message: Any) -> None:
        status.append(message.get("status", 0))

    await OwnOptionsOnly(app, limit)({"type": "http", "method": "POST"}, receive, send)
    return status[0], seen[0] if seen else None


def test_middleware_refuses_the_other_options_of_the_flag() -> None:
    def ask(text: str, **more: Any) -> tuple[int, bytes | None]:
        return asyncio.run(through_middleware(text.encode(), **more))

    for good in ('{"a": 1}', '{"media_io_kwargs": null}', '{"a": "media_io_kwargs"}', "", "{"):
        assert ask(good) == (200, good.encode())
    for bad in (
        '{"media_io_kwargs": {"video": {"num_frames": -1}}}',
        '{"media_io_kwargs": {"a": 1}, "media_io_kwargs": null}',
        r'{"media_io\u005fkwargs": {"a": 1}}',
        '{"requests": [{"media_io_kwargs": {"a": 1}}]}',
        '{"media_io_kwargs": {"a": NaN}, }',
    ):
        assert ask(bad) == (400, None)
    assert ask('{"a": 1}', limit=7) == (413, None)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "utf-32-le"])
def test_every_encoding_that_json_allows_is_checked(encoding: str) -> None:
    body = '{"media_io_kwargs": {"a": 1}}'.encode(encoding)
    assert asyncio.run(through_middleware(body)) == (400, None)


def test_bodies_of_clients_without_a_key_are_not_read() -> None:
    """vLLM's check of the key comes after this middleware, and answers without the body."""
    statuses: list[int] = []

    async def unauthorized(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 401, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def receive() -> Any:
        raise AssertionError("the body was read")

    async def send(message: Any) -> None:
        statuses.append(message.get("status", 0))

    scope = {"type": "http", "method": "POST"}
    asyncio.run(OwnOptionsOnly(unauthorized)(scope, receive, send))
    assert statuses == [401, 0]


@pytest.mark.parametrize(
    ("hosts", "good", "bad"),
    [
        (None, ["any.example", ""], []),
        ('["127.0.0.1"]', ["localhost:8000", "127.0.0.1", "[::1]:1", ""], ["evil.example", "["]),
        ('["0.0.0.0"]', ["any.example"], []),
        ('["0.0.0.0", "ai.example"]', ["AI.example:80", "192.0.2.1"], ["x.ai.example"]),
    ],
)  # fmt: skip
def test_host_names(
    hosts: str | None, good: list[str], bad: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A web page that gives its own name the address of the server must not reach it."""
    if hosts is not None:
        monkeypatch.setenv("TOKENCOMP_HOSTS", hosts)
    called: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        called.append(scope["type"])

    def ask(names: list[str], kind: str = "http") -> list[Any]:
        sent: list[Any] = []

        async def send(message: Any) -> None:
            sent.append(message)

        headers = [(b"host", name.encode()) for name in names]
        scope = {"type": kind, "method": "GET", "headers": headers}
        asyncio.run(OwnOptionsOnly(app)(scope, None, send))  # type: ignore[arg-type]
        return sent

    for name in good:
        assert not ask([name]) and not ask([name], "websocket")
    assert len(called) == 2 * len(good)
    for name in bad:
        for names in ([name], ["localhost", name]):
            first, second = ask(names)
            assert first["status"] == 403
            assert "--allowed-host" in json.loads(second["body"])["error"]["message"]
        assert ask([name], "websocket")[0]["type"] == "websocket.close"
    assert len(called) == 2 * len(good)


def test_the_answer_of_the_application_to_a_refusal_is_replaced() -> None:
    """FastAPI turns an exception while it reads the body into an answer of its own."""
    sent: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        try:
            await receive()
        except Exception:
            await send({"type": "http.response.start", "status": 500, "headers": []})
            await send({"type": "http.response.body", "body": b"There was an error"})

    async def receive() -> Any:
        return {"type": "http.request", "body": b'{"media_io_kwargs": {"a": 1}}'}

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(OwnOptionsOnly(app)({"type": "http", "method": "POST"}, receive, send))
    assert [m.get("status") for m in sent] == [400, None]
    assert json.loads(sent[1]["body"])["error"]["message"].startswith("media_io_kwargs")


def raised_in(module: str, error: Exception) -> Exception:
    """Return `error` with the traceback of a function of `module`."""
    scope = {"__name__": module, "error": error}
    exec("def f():\n    raise error", scope)
    try:
        scope["f"]()
    except Exception as caught:
        return caught
    raise AssertionError


@pytest.mark.parametrize("kind", [ZeroDivisionError, RuntimeError, DecompressionBombError])
def test_media_that_vllm_cannot_process_get_400(kind: type[Exception]) -> None:
    def ask(module: str, **more: Any) -> int:
        error = raised_in(module, kind("upper bound and lower bound"))
        return asyncio.run(through_middleware(b'{"url": "data:"}', error=error, **more))[0]

    assert ask("vllm.multimodal.video") == 400
    for module, more in (("vllm.v1.engine.core_client", {}), ("vllm.multimodal", {"late": True})):
        with pytest.raises(kind):
            ask(module, **more)


def test_file_urls_of_what_is_no_file_are_refused_before_they_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "a file").write_bytes(b"x")

    def ask(url: str) -> int:
        text = json.dumps({"messages": [{"content": [{"image_url": {"url": url}}]}]})
        return asyncio.run(through_middleware(text.encode()))[0]

    for url in ("file://{}/pipe", " FILE://{}/pipe", "file:{}/pipe", "file://{}/%70ipe"):
        assert ask(url.format(tmp_path)) == 400
    assert ask("file:///dev/zero") == 400 and ask(f"file://{tmp_path}") == 400
    assert ask(f"file://{tmp_path}/a%20file") == 200
    escaped = b'{"url": "\\u0066ile://' + f"{tmp_path}/pipe".encode() + b'"}'
    assert asyncio.run(through_middleware(escaped))[0] == 400


def test_file_url_without_a_file_gets_400() -> None:
    def ask(text: str, error: Exception, **more: Any) -> int:
        return asyncio.run(through_middleware(text.encode(), error=error, **more))[0]

    missing = FileNotFoundError(2, "No such file", "/media/none.png")
    url = '{"url": "file:///media/none.png"}'
    for error in (missing, OSError(36, "File name too long", "x" * 300)):
        assert ask(url, error) == 400
    for text, error, more in (  # not about a file of the request, or after the answer has started
        ('{"url": "data:"}', missing, {}),
        (url, ConnectionResetError("engine"), {}),
        (url, ValueError("other"), {}),
        (url, missing, {"late": True}),
    ):
        with pytest.raises(type(error)):
            ask(text, error, **more)
