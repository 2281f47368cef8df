"""What both servers refuse before a model sees it: heads, bodies, messages, media and settings."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette")

import anyio
from support.serving import doors, http
from support.serving.doors import CHAT, REACHED, ask, part, user
from support.serving.files import canvas, data, frames, image, picture, png

from tokencomp.serving import media
from tokencomp.serving.limits import Limits

KEY = ("authorization", "Bearer sécret")
PREFLIGHT = [("origin", "http://a.example"), ("access-control-request-method", "POST")]


@pytest.fixture(params=[doors.hf, doors.vllm, doors.router], ids=["hf", "vllm", "router"])
def server(request: pytest.FixtureRequest) -> Any:
    return request.param


# -- the head of a request ------------------------------------------------------------------------


def test_only_probes_and_preflights_are_answered_without_the_key(server: Any) -> None:
    """Use without the key, also by other spellings of a path: refused before the body arrives."""
    app = server(api_key="sécret")
    for path in ("/health", "/ping", "/metrics"):
        assert ask(app, b"", path, "GET").status in (200, REACHED)
        assert ask(app, None, path, "POST").status == 401
    assert ask(app, None, CHAT, "OPTIONS", PREFLIGHT).status in (200, REACHED)
    words = ("Bearer wrong", "sécret", "Basic sécret", "Bearer sécret2", "Bearer")
    wrong = [[], PREFLIGHT[:1], PREFLIGHT[1:], *([("authorization", word)] for word in words)]
    paths = ("", "/v1/models/tiny", "/version", "/invocations", "/health/", "/v1//models")
    for path in (CHAT, "/v1/models", "//v1/models", "/V1/models", "/x/../health", *paths):
        for method in ("GET", "POST", "OPTIONS"):
            for headers in wrong:
                answer = ask(app, None, path, method, headers)
                assert answer.status == 401 and answer.message
                assert answer.headers["www-authenticate"] == "Bearer"
    for scheme in ("Bearer", "bearer", "BEARER"):
        right = [("authorization", f"{scheme} sécret")]
        assert ask(app, user("a"), headers=right).status == REACHED
    assert ask(app, b"{}", "/invocations", "POST", [KEY]).status == 404


def test_types_that_any_page_may_send_are_refused(server: Any) -> None:
    """Cross-site request forgery: browsers let any page send these types to any server."""
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""):
        assert ask(server(), None, headers=[("content-type", kind)]).status == 415
    for kind in ("application/json", "Application/JSON; charset=utf-8"):
        assert ask(server(), user("a"), headers=[("content-type", kind)]).status == REACHED


HOSTS = [
    ({"host": "127.0.0.1"}, ["localhost:8000", "127.0.0.1", "[::1]:1", ""],
     ["evil.example:8000", "[", "a@b:c"]),
    ({"host": "127.0.0.1", "allowed_hosts": ("ai.example",)}, ["ai.example", "AI.example:80"],
     ["x.ai.example"]),
    ({"host": "0.0.0.0"}, ["any.example"], []),
    ({"host": "0.0.0.0", "allowed_hosts": ("a.example",)}, ["a.example", "192.0.2.1"],
     ["b.example"]),
]  # fmt: skip


@pytest.mark.parametrize(("bind", "good", "bad"), HOSTS, ids=range(len(HOSTS)))
def test_a_page_cannot_give_its_own_name_to_the_server(
    server: Any, bind: Any, good: list[str], bad: list[str]
) -> None:
    """DNS rebinding: a page's own name leads to this server, in the browser of a visitor."""
    app = server(**bind)
    for names in [[name] for name in good] + [[good[0], name] for name in bad] + [[b] for b in bad]:
        answer = ask(app, user("a"), headers=[("host", name) for name in names])
        assert answer.status == (403 if set(names) & set(bad) else REACHED), names


def test_a_body_with_two_lengths_is_refused(server: Any) -> None:
    """Request smuggling: a proxy that believes the other header sees two requests in one."""
    both = [("content-length", "4"), ("transfer-encoding", "chunked")]
    for path in (CHAT, "/health"):
        assert ask(server(), None, path, headers=both).status == 400


# -- the body -------------------------------------------------------------------------------------


def test_bodies_have_limits_of_size_time_and_sum(server: Any) -> None:
    """Slow POST, and bodies that fill the memory: one large, without an end, or many at a time."""
    body = json.dumps(user("a")).encode()
    n, chunked = len(body), [("transfer-encoding", "chunked")]
    assert ask(server(Limits(max_body=n, max_bodies=n)), body).status == REACHED
    assert ask(server(Limits(max_body=n, max_bodies=n)), body, headers=chunked).status == REACHED
    assert ask(server(Limits(max_body=n - 1)), body, headers=chunked).status == 413
    unread = ask(server(Limits(max_body=n - 1)), None, headers=[("content-length", str(n))])
    assert unread.status == 413 and unread.headers["connection"] == "close"
    full = ask(server(Limits(max_bodies=n - 1)), body)
    assert full.status == 503 and int(full.headers["retry-after"]) > 0
    assert ask(server(Limits(body_seconds=0.05)), None).status == 408
    app = server(Limits(max_bodies=n))
    assert [ask(app, body).status for _ in range(3)] == [REACHED] * 3  # each one is forgotten


IMAGE, SMALL = part(http.image_url(1, 28, 28)), part(image(1))
TEXT = {"type": "text", "text": "a"}
EMBEDS = {"type": "prompt_embeds", "data": "AAAA"}  # vLLM 0.33 loads it from these fields
HALF, OTHER = {"ratio": 0.5, "reducer": "uniform"}, {"ratio": 0.25, "reducer": "uniform"}
EVERY_FRAME = {"media_io_kwargs": {"video": {"num_frames": -1}}}


def say(content: Any, **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content, **fields}]}


def raw(field: str) -> str:
    return '{"messages": [{"role": "user", "content": "a"}], ' + field + "}"


def schema(size: int) -> dict[str, Any]:
    """A form of an answer, with so many characters."""
    form = {"type": "object", "properties": {"a": {"enum": ["x" * size]}}}
    return {"type": "json_schema", "json_schema": {"name": "a", "schema": form}}


def tools(size: int) -> list[dict[str, Any]]:
    function = {"name": "a", "description": "x" * size, "parameters": {"type": "object"}}
    return [{"type": "function", "function": function}]


REFUSED: dict[str, Any] = {
    "empty": b"", "half": b"{", "a list": b"[]", "a text": b'"a"', "null": b"null",
    "bytes": b"\xff\xfe\xff", "deep": '{"a": ' + "[" * 10**5,
    "digits": raw('"seed": ' + "1" * 5000), "surrogate": raw(r'"stop": "\ud800"'),
    "surrogates": raw(r'"stop": ["a", "\uDFFF"]'),
    "bytes of one": raw('"stop": "X"').encode().replace(b"X", b"\xed\xa0\x80"),
    "a key of one": raw(r'"mm_processor_kwargs": {"\ud800": 1}'),
    "messages: a text": {"messages": "a"}, "messages: an object": {"messages": {"role": "user"}},
    "messages: texts": {"messages": ["a"] * 10**5}, "messages: lists": {"messages": [[]]},
    "content: a number": say(3), "content: texts": say(["text"]), "content: lists": say([[TEXT]]),
    "content: an object": say(TEXT), "content: embeddings": say(EMBEDS),
    "parts: unknown": say([{"type": "x"}] * 10**5), "parts: embeddings": say([EMBEDS]),
    "part: another kind": say([{"type": "input_image", "image_url": {"url": image(1)}}]),
    "part: a URL alone": say([{"type": "image_url", "image_url": image(1)}]),
    "part: no text": say([{"type": "text", "text": 3}]), "part: fps": say([{**IMAGE, "fps": 2}]),
    **{f"{name}: an object": say("?", **{name: EMBEDS})
       for name in ("reasoning", "reasoning_content", "name", "documents", "image_url")},
    # The caches are shared: another client's picture would be answered for this one's.
    **{f"uuid {name!r}": say([{**IMAGE, "uuid": name}]) for name in ("A", 0, "")},
    "uuid alone": say([{"image_url": None, "uuid": "A"}]),
    "every frame": user("a", **EVERY_FRAME),
    "every frame, escaped": raw(r'"media_io_kwargs": {"video": {"num\u005fframes": 1}}'),
    "every frame, utf-16": json.dumps(EVERY_FRAME).encode("utf-16"),
    "every frame, utf-32": json.dumps(EVERY_FRAME).encode("utf-32-le"),
    "pixels": user("a", media_io_kwargs={"video": {"pixels": 10**9}}),
    "policy": user("a", media_io_kwargs={"video": {"frames": "best"}}),
    "two settings": user("a", tokencomp=HALF, mm_processor_kwargs={"tokencomp": OTHER}),
    "a schema": user("a", response_format=schema(70_000)),
    "tools": user("a", tools=tools(70_000)),
    "choices": user("a", structured_outputs={"choice": ["x" * 70_000]}),
    "values": (b"[" * 1_000_001, 413), "pairs": (b'{"a":[' + b"{}," * 500_000 + b"{}]}", 413),
    "frames": (user("a", media_io_kwargs={"video": {"frames": 64}}), 413),
    "items": (user(*[SMALL] * 33), 413),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_server_takes(server: Any, name: str) -> None:
    """Malformed bodies, bombs of JSON, schemas and frames, and media under the names of others.

    The error says why in a few words, although it may quote the request.
    """
    row = REFUSED[name]
    body, status = row if isinstance(row, tuple) else (row, 400)
    answer = ask(server(), body)
    assert answer.status == status and len(answer.message) <= 500


# What clients received and send back is among these, with all of its empty fields.
ANSWERED = {"role": "assistant", "content": "Red.", "refusal": None, "annotations": [],
            "audio": None, "function_call": None, "tool_calls": [],
            "reasoning_content": ""}  # fmt: skip
CACHED = {"cache_control": {"type": "ephemeral"}}
CITED = {**ANSWERED, "annotations": [{"type": "url_citation", "url_citation": {"url": "a"}}]}
TAKEN: dict[str, Any] = {
    "text": user("größer"), "emoji": r'{"messages": [{"role": "user", "content": "\ud83d\ude00"}]}',
    "named": say("?", name="a"), "turns": {"messages": [*user("a")["messages"], ANSWERED]},
    "no uuid": user({**IMAGE, "uuid": None}), "detail": user(part(image(1), detail="high")),
    "details": user(part(image(1), detail="auto"), SMALL), "items": user(*[SMALL] * 32),
    "frames": user("a", media_io_kwargs={"video": {"frames": "stream:8"}}),
    "as before": user("a", media_io_kwargs=None), "nothing": user("a", media_io_kwargs={}),
    "equal settings": user("a", tokencomp=HALF, mm_processor_kwargs={"tokencomp": HALF}),
    "a setting for low detail": user(part(image(1), detail="low"), tokencomp=HALF),
    "low detail": user(part(image(1), detail="low"), SMALL),
    "fields of gateways": user(
        {**TEXT, **CACHED}, {**part(image(1), format="image/png"), **CACHED},
        reasoning_effort="low", verbosity="low", user="a", prompt_cache_key="a",
    ),
    "citations": {"messages": [*user("a")["messages"], CITED, *user("b")["messages"]]},
    "tools that are not offered": user("a", tools=tools(9), tool_choice="none"),
}  # fmt: skip


@pytest.mark.parametrize("name", TAKEN)
def test_what_both_servers_take(server: Any, name: str) -> None:
    answer = ask(server(), TAKEN[name])
    assert answer.status == REACHED, answer.content


@pytest.mark.parametrize("depth", [10, 950, 980, 985, 988, 989, 990, 991, 992, 995, 1000, 5000])
def test_deep_bodies_are_answered(server: Any, depth: int) -> None:
    """Stack exhaustion by nested JSON, which Python reads a little deeper than it writes it."""
    nested = "[" * depth + "]" * depth
    for fields in (f'"x": {nested}', f'"x": {nested}, "tokencomp": {{"ratio": 0.5}}'):
        assert ask(server(), raw(fields)).status in (400, REACHED)


LOW, SHARP = part(image(1), detail="low"), part(image(1), detail="high")


@pytest.mark.parametrize(
    ("parts", "options", "status"),
    [
        ([LOW, LOW], {"low_detail_ratio": 0.9}, REACHED),
        ([LOW, SHARP], {"low_detail_ratio": 0.9}, 400),  # all images of a request share it
        ([part(frames(1, 2), detail="low")], {"low_detail_ratio": 0.9}, 400),
    ],
)
def test_low_detail_is_a_ratio_of_the_operator(
    server: Any, parts: Any, options: Any, status: int
) -> None:
    assert ask(server(options=options), user(*parts)).status == status


# -- media ----------------------------------------------------------------------------------------

LIMITS = Limits(max_pixels=10_000, max_total_pixels=25_000)
GOOD, PAIR = image(100), frames(100, 2)
MEDIA: dict[str, tuple[list[str], int]] = {
    "one": ([GOOD], REACHED), "two": ([GOOD, GOOD], REACHED), "a list": ([PAIR], REACHED),
    "capitals": ([PAIR.replace("video/jpeg", "VIDEO/JPEG")], REACHED),
    "large": ([data(picture(100, 101))], 413), "three": ([GOOD] * 3, 413),
    "a bomb": ([png(30_000)], 413),
    "a list and one": ([PAIR, GOOD], 413), "a list of four": ([PAIR + PAIR[22:]], 413),
    "a list of 33": ([frames(1, 33)], 413),
    "parameters": ([frames(101, 1).replace(";", ";a=b;", 1)], 413),
    "no picture": ([data(b"no picture")], 400), "half": ([GOOD[:120]], 400),
    "vectors": ([data(b"<svg/>", "image/svg+xml")], 400), "empty": ([data(b"")], 400),
    "no base64": (["data:image/png;base64,%"], 400), "as text": (["data:image/png,abc"], 400),
    "no base64 in a video": (["data:video/mp4;base64,%"], 400),
}  # fmt: skip


@pytest.mark.parametrize("name", MEDIA)
def test_pixels_are_counted_before_they_are_decoded(server: Any, name: str) -> None:
    """Decompression bombs: a picture of a few kilobytes may have gigapixels."""
    urls, status = MEDIA[name]
    answer = ask(server(LIMITS), user(*map(part, urls), TEXT))
    assert answer.status == status, answer.content


def test_nothing_is_fetched(server: Any) -> None:
    """Server-side request forgery: a URL names a host that only this server can reach."""
    with http.unreached_urls() as urls:
        for url in [*urls, "HTTPS://invalid./", "ftp://127.0.0.1/x", f" {urls[0]}", "nonsense"]:
            for kind in ("image_url", "video_url"):
                assert ask(server(), user(part(url, kind))).status == 400


def test_file_urls_must_name_files_below_the_path(server: Any, tmp_path: Path) -> None:
    """Path traversal by dots and links, and files without an end."""
    inside = tmp_path / "media"
    inside.mkdir()
    http.image(inside / "a file.png")
    os.mkfifo(inside / "pipe")
    good = user(part(f"file://{inside}/a%20file.png"))
    assert ask(server(), good).status == 400
    size = (inside / "a file.png").stat().st_size
    assert ask(server(Limits(allowed_path=inside, max_bytes=size)), good).status == REACHED
    assert ask(server(Limits(allowed_path=inside, max_bytes=size - 1)), good).status == 413
    for url in [
        *(f"{start}{inside}/pipe" for start in ("file://", "FILE://", "file:")), "file:///dev/zero",
        f"file://{inside}/none.png", f"file://{inside}/{'x' * 300}",
        *http.outside(inside, tmp_path / "secret.png"),
    ]:  # fmt: skip
        answer = ask(server(Limits(allowed_path=inside)), user(part(url)))
        assert answer.status == 400, url
        assert "passwd" not in answer.message and "secret" not in answer.message


def test_a_text_does_not_wait_for_the_media_of_others(
    server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More requests than may decode at a time, none of which ends before the text is answered."""
    slow, begun, answers = threading.Event(), threading.Semaphore(0), []

    def decode(*_: Any) -> int:
        begun.release()
        assert slow.wait(20)
        return 1

    monkeypatch.setattr(media, "check_image", decode)
    app = server()

    async def run() -> None:
        async with anyio.create_task_group() as group:
            for _ in range(8):
                group.start_soon(doors.through, app, user(SMALL))
            for _ in range(4):
                assert await anyio.to_thread.run_sync(begun.acquire, True, 20)
            with anyio.fail_after(20):
                answers.append(await doors.through(app, user("?")))
            slow.set()

    anyio.run(run)
    assert [answer.status for answer in answers] == [REACHED]


def test_an_animation_that_costs_gigabytes_is_refused_undecoded() -> None:
    """Decompression bomb: 45 kB, 27 gigapixels. For vLLM see test_vllm_frames."""
    assert ask(doors.hf(), user(part(canvas(3000, 3000)))).status == 413
