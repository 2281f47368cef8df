"""The middleware before vLLM's routes: what it refuses, and what it answers for vLLM."""

from __future__ import annotations

import asyncio
import base64
import functools
import io
import json
import os
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import AsyncMock

import pytest

pytest.importorskip("starlette")

import anyio
from PIL import Image
from support.serving import http

from tokencomp.serving.bind import Bind
from tokencomp.serving.limits import Limits, RequestError
from tokencomp.serving.vllm import request_checks
from tokencomp.serving.vllm.middleware import UNREADABLE, Guard
from tokencomp.serving.vllm.rules import Rules

CHAT = "/v1/chat/completions"
KEY = "secret"


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TOKENCOMP_RULES", "TOKENCOMP_SERVING", "VLLM_API_KEY"):
        monkeypatch.delenv(name, raising=False)


class Application:
    """What stands in for vLLM: it reads a body and answers 200, or fails."""

    def __init__(
        self, error: Exception | None = None, late: bool = False, status: int = 200
    ) -> None:
        self.error, self.late, self.status = error, late, status
        self.seen: list[bytes | None] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.seen.append((await receive())["body"] if scope.get("method") == "POST" else None)
        if self.error is not None and not self.late:
            raise self.error
        await send({"type": "http.response.start", "status": self.status, "headers": []})
        if self.error is not None:
            raise self.error
        await send({"type": "http.response.body", "body": b""})


async def through(
    guard: Guard, body: Any = None, path: str = CHAT, method: str = "POST"
) -> dict[str, Any]:
    """Return the head of the answer to a body."""
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.request", "body": json.dumps(body).encode()}

    async def send(message: Any) -> None:
        sent.append(message)

    names = [(b"content-type", b"application/json")]
    scope = {"type": "http", "method": method, "path": path, "headers": names}
    await guard(scope, receive, send)
    return dict(sent[0])


def ask(
    app: Application,
    body: bytes | str | dict[str, Any] | None,
    path: str = CHAT,
    method: str = "POST",
    headers: Any = (),
    limits: Limits | None = None,
    root: str = "",
) -> tuple[int, str]:
    """Return status and message of the answer; a body of None never arrives."""
    content = json.dumps(body) if isinstance(body, dict) else body
    content = content.encode() if isinstance(content, str) else content
    sent: list[Any] = []
    pieces = [] if content is None else [content[: len(content) // 2], content[len(content) // 2 :]]

    async def receive() -> Any:
        if not pieces:
            await asyncio.sleep(60)
        return {"type": "http.request", "body": pieces.pop(0), "more_body": bool(pieces)}

    async def send(message: Any) -> None:
        sent.append(message)

    names = [(b"content-type", b"application/json"), (b"transfer-encoding", b"chunked"), *headers]
    scope = {"type": "http", "method": method, "path": path, "headers": names, "root_path": root}
    asyncio.run(
        asyncio.wait_for(Guard(app, limits and Rules(limits=limits))(scope, receive, send), 20)
    )
    text = b"".join(m.get("body", b"") for m in sent)
    return sent[0]["status"], json.loads(text)["error"]["message"] if text else ""


def chat(*parts: Any, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(parts)}], **more}


def media(url: Any, kind: str = "image_url", **more: Any) -> dict[str, Any]:
    return chat({"type": kind, kind: {"url": url}, **more})


def refused(body: Any, limits: Limits | None = None) -> tuple[int, str]:
    """Return the answer to a body that the application never sees."""
    app = Application()
    answer = ask(app, body, limits=limits)
    assert answer[0] >= 400 and not app.seen, answer
    return answer


def passes(body: Any, limits: Limits | None = None) -> None:
    app = Application()
    assert ask(app, body, limits=limits) == (200, "")
    content = json.dumps(body).encode() if isinstance(body, dict) else body
    assert app.seen == [content]


# -- the head of a request ------------------------------------------------------------------------


PREFLIGHT = [(b"origin", b"http://a.example"), (b"access-control-request-method", b"POST")]


def test_only_probes_and_preflights_are_answered_without_the_key(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Browsers never send the key with the question what a page may send."""
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    right = [(b"authorization", b"Bearer " + KEY.encode())]
    for path in ("/health", "/ping", "/metrics"):
        assert ask(Application(), b"", path, "GET")[0] == 200
        assert ask(Application(), None, path, "POST")[0] == 401
    assert ask(Application(), None, CHAT, "OPTIONS", PREFLIGHT)[0] == 200
    wrong = [[], [(b"authorization", b"Bearer x")], PREFLIGHT[:1], PREFLIGHT[1:]]
    for path in (CHAT, "/v1/models", "/version", "/invocations", "/health/"):
        for method in ("GET", "POST", "OPTIONS"):
            for headers in wrong:
                app = Application()
                assert ask(app, None, path, method, headers)[0] == 401  # the body is not read
                assert not app.seen
        known = path in (CHAT, "/v1/models", "/version")
        assert ask(Application(), b"{}", path, "POST", right)[0] == (200 if known else 404)


def test_paths_below_a_prefix_of_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    right = [(b"authorization", b"Bearer " + KEY.encode())]
    for path, status in (("/api/health", 200), ("/api" + CHAT, 401), ("/apihealth", 401)):
        assert ask(Application(), None, path, "GET", root="/api")[0] == status
    for path, status in (
        (CHAT, 200),
        ("/api" + CHAT, 200),
        ("/api/api" + CHAT, 404),
        ("/api", 404),
    ):
        assert ask(Application(), b"{}", path, headers=right, root="/api")[0] == status


def test_a_server_that_shuts_down_says_so() -> None:
    """vLLM answers 200 to probes and 500 to new requests until running ones have ended."""
    client, ended = SimpleNamespace(shutdown=lambda timeout: ended.append(timeout)), []
    app = Application()
    guard, status = Guard(app), functools.partial(through, path="/health", method="GET")
    scope = {
        "type": "lifespan",
        "app": SimpleNamespace(state=SimpleNamespace(engine_client=client)),
    }
    asyncio.run(guard(scope, None, AsyncMock()))  # type: ignore[arg-type]
    assert asyncio.run(status(guard))["status"] == 200
    app.status = 500  # a failure of its own
    assert asyncio.run(through(guard, chat()))["status"] == 500
    client.shutdown(timeout=60)
    assert ended == [60]
    calls = len(app.seen)
    for answer in (status(guard), through(guard, chat())):
        sent = asyncio.run(answer)
        headers = {name.lower(): value for name, value in sent["headers"]}
        assert sent["status"] == 503 and int(headers[b"retry-after"]) > 0
        assert headers[b"connection"] == b"close"
    assert len(app.seen) == calls
    app.status = 200
    assert asyncio.run(through(guard, path="/metrics", method="GET"))["status"] == 200


def test_a_request_that_the_end_of_the_server_stops_may_be_sent_again() -> None:
    app, guard = Application(status=500), Guard(Application())

    async def ending(*arguments: Any) -> None:
        guard.draining = True
        await app(*arguments)

    guard.app = ending
    assert asyncio.run(through(guard, chat()))["status"] == 503 and app.seen


def test_a_websocket_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    app, sent = Application(), []

    async def send(message: Any) -> None:
        sent.append(message["type"])

    asyncio.run(Guard(app)({"type": "websocket", "path": "/v1/realtime"}, None, send))  # type: ignore[arg-type]
    assert sent == ["websocket.close"] and not app.seen


def test_a_page_cannot_give_its_own_name_to_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENCOMP_RULES", Rules(Bind("127.0.0.1")).as_json())
    for names, status in (
        (["localhost:8000"], 200), ([""], 200), (["evil.example"], 403), (["["], 403),
        (["localhost", "evil.example"], 403),
    ):  # fmt: skip
        headers = [(b"host", name.encode()) for name in names]
        assert ask(Application(), b"", "/health", "GET", headers)[0] == status


# -- the body -------------------------------------------------------------------------------------


def test_bodies_have_limits_of_size_time_and_sum() -> None:
    assert refused(b'{"a": 1}', Limits(max_body=7))[0] == 413
    assert refused(b'{"a": 1}', Limits(max_bodies=7))[0] == 503
    assert refused(None, Limits(body_seconds=0.05))[0] == 408
    assert refused("[" * 1_000_001)[0] == 413
    passes(b'{"a": 1}', Limits(max_body=8, max_bodies=8))


def test_what_is_no_json_object_is_refused() -> None:
    digits = '{"seed": ' + "1" * 5000 + "}"
    for bad in ("", "{", "[]", '"a"', '{"a": ' + "[" * 10**5, digits, b"\xff\xfe\xff"):
        assert refused(bad)[0] == 400


def test_options_of_decoding_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"media_io_kwargs": {"video": {"num_frames": -1}}}
    status, message = refused(options)
    assert status == 400 and "frames of videos alone" in message
    assert refused(r'{"media_io\u005fkwargs": {"a": 1}}')[0] == 400
    for encoding in ("utf-16", "utf-32-le"):
        assert refused(json.dumps(options).encode(encoding))[0] == 400
    passes({"media_io_kwargs": {"video": {"frames": "stream:8"}}})
    for good in ({"media_io_kwargs": None}, {"media_io_kwargs": {}}, {"a": "media_io_kwargs"}):
        passes(good)
    monkeypatch.setenv("TOKENCOMP_RULES", Rules(media_options=True).as_json())
    passes(options)


def test_clients_cannot_name_cache_entries() -> None:
    """The caches are shared: another client's picture would be answered for this one's."""
    passes(media(http.image_url(1), uuid=None))
    for part in (
        {"type": "image_url", "image_url": {"url": http.image_url(1)}},
        {"image_url": None},
    ):
        for name in ("A", 0, ""):
            status, message = refused(chat({**part, "uuid": name}))
            assert status == 400 and "uuid" in message


def test_messages_have_known_fields_alone() -> None:
    """What clients received and send back is among these, with all of its empty fields."""
    empty = {"annotations": [], "audio": None, "function_call": None, "refusal": None}
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    said = {"role": "assistant", "content": None, "tool_calls": [call], **empty}
    result = {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "2"}]}
    passes({"messages": [{"role": "user", "content": "?", "name": "a"}, said, result]})
    passes({"messages": [{"role": "assistant", "content": "a", "reasoning_content": "b"}]})
    embeds = {"type": "prompt_embeds", "data": "AAAA"}  # vLLM 0.33 loads it from these fields
    for field in ("reasoning", "reasoning_content", "name", "documents", "image_url"):
        assert refused({"messages": [{"role": "user", "content": "?", field: embeds}]})[0] == 400
    for content in (embeds, 3, ["text"], [[{"type": "text", "text": "a"}]], {"type": "text"}):
        assert refused({"messages": [{"role": "user", "content": content}]})[0] == 400
    for messages in ("a", {"role": "user"}, ["a"], [[]]):
        assert refused({"messages": messages})[0] == 400


def test_the_setting_may_have_a_field_of_its_own() -> None:
    """As on `--engine hf`; vLLM alone would ignore it and compress as by default."""
    app, setting = Application(), {"ratio": 0.75}
    assert ask(app, chat(tokencomp=setting, mm_processor_kwargs={"a": 1}))[0] == 200
    sent = json.loads(app.seen[0] or b"")
    assert sent == chat(mm_processor_kwargs={"a": 1, "tokencomp": setting})
    both = chat(tokencomp=setting, mm_processor_kwargs={"tokencomp": setting})
    assert ask(Application(), both)[0] == 200
    both["tokencomp"] = {"ratio": 0.5}
    status, message = refused(both)
    assert status == 400 and "two settings" in message


def test_seeds_are_refused_on_a_cpu_unless_nothing_is_sampled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(request_checks, "runs_on_cpu", lambda: True)
    status, message = refused({"seed": 3, "n": 64})
    assert status == 400 and "temperature" in message
    passes({"seed": 3, "temperature": 0})
    passes({"seed": None, "n": 64})
    monkeypatch.setattr(request_checks, "runs_on_cpu", lambda: False)
    passes({"seed": 3, "n": 64})


def test_requests_on_which_vllm_fails_are_refused() -> None:
    picture = media(http.image_url(1))
    status, message = refused({**picture, "truncate_prompt_tokens": 5})
    assert status == 400 and "truncate_prompt_tokens" in message
    passes({"truncate_prompt_tokens": 5})
    for stop in ('"\\ud800"', '["a", "\\uDFFF"]', '{"\\ud800": 1}'):
        status, message = refused(f'{{"stop": {stop}}}')
        assert status == 400 and "surrogate" in message
    assert refused(b'{"stop": "\xed\xa0\x80"}')[0] == 400
    passes('{"stop": "\\ud83d\\ude00", "a": "größer"}'.encode())


def test_low_detail_is_a_ratio_of_the_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    def part(kind: str, url: str, detail: Any) -> dict[str, Any]:
        return {"type": kind, kind: {"url": url, "detail": detail}}

    low, high = (part("image_url", http.image_url(1), detail) for detail in ("low", "high"))
    clip = part("video_url", http.video_url(1), None)
    assert "--low-detail-ratio" in refused(chat(low))[1]
    passes(chat(high, part("image_url", http.image_url(1), None)))
    passes(chat(low, high, mm_processor_kwargs={"tokencomp": {}}))  # options of its own
    monkeypatch.setenv("TOKENCOMP_SERVING", '{"ratio": 0.5, "low_detail_ratio": 0.9}')
    for parts, ratio in (([low, low], 0.9), ([low, clip], {"image": 0.9, "video": 0.5})):
        app = Application()
        assert ask(app, chat(*parts, seed=None, temperature=0.5))[0] == 200
        sent = {
            "seed": None,
            "temperature": 0.5,
            "mm_processor_kwargs": {"tokencomp": {"ratio": ratio}},
        }
        assert json.loads(app.seen[0] or b"") == chat(*parts, **sent)
    assert "share" in refused(chat(low, high))[1]
    assert "for images" in refused(chat(part("video_url", http.video_url(1), "low")))[1]


# -- media ----------------------------------------------------------------------------------------


def test_nothing_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    urls = ["http://192.0.2.1/x.png", "HTTPS://invalid./", "ftp://a/b", " http://a/b", "a"]
    for url in urls:
        for body in (media(url), media(url, "video_url")):
            status, message = refused(body)
            assert status == 400 and "fetches nothing" in message
    monkeypatch.setenv("TOKENCOMP_RULES", Rules(remote_media=True).as_json())
    passes(media(urls[0]))
    assert refused(media("ftp://a/b"))[0] == 400


def test_file_urls_must_name_files_below_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside = tmp_path / "media"
    inside.mkdir()
    http.image(inside / "a file.png")
    os.mkfifo(inside / "pipe")
    good = f"file://{inside}/a%20file.png"
    assert "--allowed-media-path" in refused(media(good))[1]
    monkeypatch.setenv("TOKENCOMP_RULES", Rules(limits=Limits(allowed_path=inside)).as_json())
    passes(media(good))
    for url in [
        *(f"{start}{inside}/pipe" for start in ("file://", "FILE://", "file:")),
        "file:///dev/zero", f"file://{inside}", f"file://{inside}/none.png",
        f"file://{inside}/{'x' * 300}", *http.outside(inside, tmp_path / "secret.png"),
    ]:  # fmt: skip
        assert refused(media(url))[0] == 400, url


def picture(width: int, height: int, frames: int = 1, kind: str = "PNG") -> bytes:
    """Return a picture of a few bytes; further frames have one pixel each."""
    rest = [Image.new("L", (1, 1), i % 255) for i in range(frames - 1)]
    out = io.BytesIO()
    Image.new("L", (width, height)).save(out, kind, save_all=frames > 1, append_images=rest)
    return out.getvalue()


def data(content: bytes, media_type: str = "image/png") -> str:
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"


def test_pixels_are_counted_before_vllm_decodes_them(tmp_path: Path) -> None:
    limits = Limits(max_pixels=10_000, max_total_pixels=25_000)
    good, large = data(picture(100, 100)), data(picture(100, 101))
    pictures = {"type": "image_url", "image_url": {"url": good}}
    passes(media(good), limits)
    passes(chat(pictures, pictures, {"type": "text", "text": "?"}), limits)
    for bad in (media(large), chat(pictures, pictures, pictures)):
        assert refused(bad, limits)[0] == 413
    listed = "data:video/jpeg;base64," + ",".join([good.partition(",")[2]] * 2)
    passes(media(listed, "video_url"), limits)
    video = {"type": "video_url", "video_url": {"url": listed}}
    for bad in (chat(video, pictures), media(listed + listed[22:], "video_url")):
        assert refused(bad, limits)[0] == 413
    assert refused(media("data:video/jpeg;a=b;base64," + large[22:], "video_url"), limits)[0] == 413
    many = "data:VIDEO/JPEG;base64," + ",".join([data(picture(1, 1))[22:]] * 33)
    status, message = refused(media(many, "video_url"))
    assert status == 413 and "33 frames; the limit is 32" in message
    one = {"type": "image_url", "image_url": {"url": data(picture(1, 1))}}
    passes(chat(*[one] * 32))
    assert refused(chat(*[one] * 33))[0] == 413
    assert refused(media(data(b"no picture")))[0] == 400
    assert refused(media("data:video/mp4;base64,%", "video_url"))[0] == 400


def test_video_files_share_the_pixels_that_images_leave() -> None:
    """Each could have those of a whole request, so that 32 clips took 32 times the limit."""
    limits = Limits(max_pixels=10_000, max_total_pixels=25_000)
    clip = {"type": "video_url", "video_url": {"url": data(b"any", "video/mp4")}}
    image = {"type": "image_url", "image_url": {"url": data(picture(100, 100))}}
    for parts, pixels in (([clip], 25_000), ([clip, image, clip], 7_500), ([clip] * 4, 6_250)):
        for chosen in ({}, {"frames": 8}):
            app = Application()
            body = chat(*parts, media_io_kwargs={"video": chosen} if chosen else None)
            assert ask(app, body, limits=limits)[0] == 200
            sent = json.loads(app.seen[0] or b"")
            assert sent == {**body, "media_io_kwargs": {"video": {**chosen, "pixels": pixels}}}
    assert refused(chat(clip, media_io_kwargs={"video": {"pixels": 10**9}}), limits)[0] == 400


def test_a_text_does_not_wait_for_the_media_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    slow, reached, answered = threading.Event(), threading.Semaphore(0), []

    def check(*_: Any) -> int:
        reached.release()
        assert slow.wait(20)
        return 1

    monkeypatch.setattr(request_checks, "check_image", check)
    guard = Guard(Application())

    async def run() -> None:
        async with anyio.create_task_group() as group:
            for _ in range(8):
                group.start_soon(through, guard, media(http.image_url(1)))
            for _ in range(4):
                assert await anyio.to_thread.run_sync(reached.acquire, True, 20)
            with anyio.fail_after(20):
                answered.append(await through(guard, chat({"type": "text", "text": "?"})))
            slow.set()

    anyio.run(run)
    assert [head["status"] for head in answered] == [200]


def raised_in(module: str, error: Exception) -> Exception:
    """Return `error` with the traceback of a function of `module`."""
    scope = {"__name__": module, "error": error}
    exec("def f():\n    raise error", scope)
    try:
        scope["f"]()
    except Exception as caught:
        return caught
    raise AssertionError


@pytest.mark.parametrize("kind", UNREADABLE)
def test_media_that_vllm_cannot_process_get_400(kind: type[Exception]) -> None:
    def answer(module: str, **more: Any) -> tuple[int, str]:
        return ask(Application(raised_in(module, kind("/secret/path")), **more), b"{}")

    assert answer("vllm.multimodal.video") == (400, "media of this request are unreadable.")
    for module, more in (("vllm.v1.engine.core_client", {}), ("vllm.multimodal", {"late": True})):
        with pytest.raises(kind):
            answer(module, **more)
    assert ask(Application(RequestError("too large", 413)), b"{}") == (413, "too large")
    with pytest.raises(RequestError):
        ask(Application(RequestError("too large", 413), late=True), b"{}")
    with pytest.raises(TypeError):
        ask(Application(raised_in("vllm.multimodal.video", TypeError())), b"{}")
