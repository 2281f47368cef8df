"""What the middleware before vLLM's routes does that the other server has no need of."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import logging
import time
from types import SimpleNamespace
from typing import Any
from unittest.mock import AsyncMock

import pytest
import torch

pytest.importorskip("starlette")

from support.serving import http
from support.serving.doors import CHAT, REACHED, Vllm, ask, part, through, user, vllm
from support.serving.files import data, image

from tokencomp.method import Method
from tokencomp.serving.limits import Limits, RequestError
from tokencomp.serving.saved import Saved
from tokencomp.serving.spec import ServerOptions
from tokencomp.serving.vllm import marks, request_checks, roles
from tokencomp.serving.vllm.middleware import UNREADABLE, VllmGuard
from tokencomp.serving.vllm.rules import MOST, hand_on, handed

KEY = ("authorization", "Bearer secret")


def sent(body: Any, *arguments: Any, headers: Any = (), **more: Any) -> Any:
    """Return what of a body reaches vLLM."""
    app = Vllm()
    answer = ask(vllm(*arguments, app=app, **more), body, headers=headers)
    assert answer.status == REACHED, answer.content
    return json.loads(app.seen[0])


def test_fields_of_vllm_pass_unchanged() -> None:
    """Also numbers that JSON has no words for, and those of any size."""
    for text in (
        '{"a":  [1.50, "größer"], "n": null}',
        f'{{"a": [NaN, Infinity, 1e400, {10**40}]}}',
    ):
        assert str(sent(text)) == str(json.loads(text))


@pytest.mark.parametrize(
    ("path", "method", "status"),
    [
        ("/api/health", "GET", REACHED), ("/apihealth", "GET", 401), ("/api" + CHAT, "GET", 401),
        (CHAT, "POST", REACHED), ("/api" + CHAT, "POST", REACHED),
        ("/api/api" + CHAT, "POST", 404), ("/api", "POST", 404),
    ],
)  # fmt: skip
def test_paths_below_a_prefix_of_a_proxy(path: str, method: str, status: int) -> None:
    headers = [KEY] if method == "POST" else []
    assert ask(vllm(api_key="secret"), b"{}", path, method, headers, "/api").status == status


def test_a_server_that_shuts_down_says_so() -> None:
    """vLLM answers 200 to probes and 500 to new requests until running ones have ended."""
    ended: list[int] = []
    client = SimpleNamespace(
        shutdown=lambda timeout: ended.append(timeout), generate=None, errored=False
    )
    app = Vllm()
    guard = vllm(app=app)
    status = functools.partial(through, guard, path="/health", method="GET")
    state = SimpleNamespace(engine_client=client)
    guard.app = AsyncMock()
    asyncio.run(guard({"type": "lifespan", "app": SimpleNamespace(state=state)}, None, None))  # type: ignore[arg-type]
    guard.app = app
    assert asyncio.run(status()).status == REACHED
    app.status = 500  # a failure of its own
    assert ask(guard, user("a")).status == 500
    client.shutdown(timeout=60)
    assert ended == [60]
    calls = len(app.seen)
    for answer in (asyncio.run(status()), ask(guard, user("a"))):
        assert answer.status == 503 and int(answer.headers["retry-after"]) > 0
        assert answer.headers["connection"] == "close"
    assert len(app.seen) == calls
    app.status = 200
    assert ask(guard, path="/metrics", method="GET").status == 200


def test_a_request_that_the_end_of_the_server_stops_may_be_sent_again() -> None:
    app = Vllm()
    app.status, guard = 500, vllm()

    async def ending(*arguments: Any) -> None:
        guard.draining = True
        await app(*arguments)

    guard.app = ending
    assert ask(guard, user("a")).status == 503 and app.seen


def test_a_websocket_is_closed() -> None:
    """Use without the key, which is in the head of HTTP requests."""
    send = AsyncMock()
    asyncio.run(vllm(app=AsyncMock(side_effect=AssertionError))({"type": "websocket"}, None, send))  # type: ignore[arg-type]
    assert send.await_args.args[0]["type"] == "websocket.close"


# -- further paths --------------------------------------------------------------------------------

OPENED = {"paths": ("/v1/responses", "/v1/responses/", "/tokenize")}


@pytest.mark.parametrize(
    ("path", "method", "status"),
    [
        ("/v1/responses", "POST", REACHED), ("/v1/responses/a/cancel", "POST", REACHED),
        ("/v1/responses/a", "GET", REACHED), ("/tokenize", "POST", REACHED),
        ("/tokenize/a", "POST", 404), ("/v1/responsesx", "POST", 404), ("/sleep", "POST", 404),
    ],
)  # fmt: skip
def test_the_operator_may_open_further_paths(path: str, method: str, status: int) -> None:
    """Under the same key and the same limits."""
    body = {"input": "a"}
    guard = vllm(Limits(max_body=100), rules=OPENED, api_key="secret")
    assert ask(guard, body, path, method).status == 401
    assert ask(guard, body, path, method, [KEY]).status == status
    assert ask(guard, b"", path, method, [KEY]).status == status  # some have no body
    if method == "POST" and status == REACHED:
        assert ask(guard, {"input": "a" * 100}, path, method, [KEY]).status == 413
        assert ask(guard, b"[]", path, method, [KEY]).status == 400
    closed = vllm(api_key="secret")
    assert ask(closed, body, path, method, [KEY]).status == 404


def test_media_of_further_paths_are_in_messages_of_chat_or_refused() -> None:
    """Nobody would check their size elsewhere."""
    url, guard = data(b"any", "image/png"), vllm(rules=OPENED)
    text, large = {"type": "input_text", "text": "see data: 1"}, part(image(100))
    for content, status in (
        ({"input": [{"role": "user", "content": [text]}]}, REACHED),
        ({"messages": [{"role": "user", "content": [large]}]}, REACHED),
        ({"input": [{"content": [{"type": "input_image", "image_url": url}]}]}, 400),
        ({"input": [{"content": [{"type": "input_image", "file_id": "a"}]}]}, 400),
        ({"input": [{"content": [{"type": "image_url", "image_url": {"url": "file:///a"}}]}]}, 400),
        ({"data_1": [{"content": url.upper()}]}, 400), ({"prompt": {"x": " " + url}}, 400),
        ({"messages": [{"content": [{"type": "image", "source": {"data": "AA"}}]}]}, 400),
    ):  # fmt: skip
        assert ask(guard, content, "/v1/responses").status == status, content
    small = vllm(Limits(max_pixels=9999), rules=OPENED)
    assert ask(small, user(large), "/tokenize").status == 413


# -- the body -------------------------------------------------------------------------------------


def test_calls_of_tools_pass() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    said = {"role": "assistant", "content": None, "tool_calls": [call]}
    result = {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "2"}]}
    body = {"messages": [*user("?")["messages"], said, result]}
    assert sent(body) == body


def test_the_operator_may_open_what_is_closed() -> None:
    options = user("a", media_io_kwargs={"video": {"num_frames": -1}})
    assert sent(options, rules={"media_options": True}) == options
    remote = user(part("http://192.0.2.1/x.png"))
    assert sent(remote, rules={"remote_media": True}) == remote
    assert ask(vllm(rules={"remote_media": True}), user(part("ftp://a/b"))).status == 400


def test_the_setting_may_have_a_field_of_its_own() -> None:
    """As on `--engine hf`; vLLM alone would ignore it and compress as by default."""
    moved = sent(user("a", tokencomp={"ratio": 0.75}, mm_processor_kwargs={"a": 1}))
    setting = moved["mm_processor_kwargs"].pop("tokencomp")
    assert setting["ratio"] == 0.75 and moved == user("a", mm_processor_kwargs={"a": 1})


SETTINGS: list[dict[str, Any]] = [
    {"ratio": 0.75}, {"budget": 8, "reducer": "uniform"}, {"merge": False}, {"ratio": 0},
    {"reducer": "random", "options": {"seed": 3}}, {"ratio": {"image": 0.25, "video": 0.75}},
    {"ratio": 0.75, "tower_ratio": 0.5, "tower_reducer": "random"}, {"reducer": "delta"},
]  # fmt: skip


@pytest.mark.parametrize("asked", SETTINGS)
def test_the_processor_finds_the_method_of_a_request(asked: Any) -> None:
    """And what it reads says all of it: a server with another default would do the same."""
    given = sent(user("a", tokencomp=asked))["mm_processor_kwargs"]["tokencomp"]
    method = handed(json.dumps(given, sort_keys=True))
    assert method == ServerOptions.parse({"ratio": 0.5}).resolve(asked)
    other = ServerOptions.parse({"ratio": 0.25, "reducer": "divprune"})
    assert method is not None and other.resolve(given).describe() == method.describe()


def test_methods_of_requests_are_not_remembered_without_end() -> None:
    for i in range(MOST + 10):
        hand_on(Method("uniform", i / (2 * MOST + 20)))
    known = [handed(json.dumps(Method("uniform", i / (2 * MOST + 20)).plain, sort_keys=True))
             for i in range(MOST + 10)]  # fmt: skip
    assert sum(method is not None for method in known) == MOST and known[-1] is not None


def test_seeds_are_refused_on_a_cpu_unless_nothing_is_sampled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for cpu, seed, temperature, taken in (
        (True, 3, 1, False), (True, 3, 0, True), (True, None, 1, True), (False, 3, 1, True),
    ):  # fmt: skip
        monkeypatch.setattr(request_checks, "runs_on_cpu", lambda cpu=cpu: cpu)
        answer = ask(vllm(), user("a", seed=seed, temperature=temperature, n=64))
        assert answer.status == (REACHED if taken else 400)


MISPLACED = {
    "ratio": 0.9, "budget": 8, "reducer": "uniform", "merge": True, "tokencom": {"ratio": 0.9},
    "extra_body": {"tokencomp": {"ratio": 0.9}}, "mm_processor_kwarg": {}, "use_beam_search": True,
}  # fmt: skip


@pytest.mark.parametrize("name", MISPLACED)
def test_settings_outside_of_their_field_are_refused(name: str) -> None:
    """vLLM ignores unknown fields: the answer would have the setting of the server."""
    answer = ask(vllm(), user(part(image(1)), **{name: MISPLACED[name]}))
    assert answer.status == 400 and name in str(answer.content)
    assert sent(user("a", min_tokens=2, top_k=3, of_a_later_vllm=1))


def test_a_ratio_of_sounds_is_refused() -> None:
    body = user(part(image(1)), tokencomp={"ratio": {"audio": 0.9}})
    answer = ask(vllm(), body)
    assert answer.status == 400 and "compresses images and videos" in str(answer.content)


def test_a_prompt_with_media_is_not_cut() -> None:
    """vLLM would fail on it."""
    assert ask(vllm(), user(part(image(1)), truncate_prompt_tokens=5)).status == 400
    assert sent(user("a", truncate_prompt_tokens=5))


def test_low_detail_becomes_a_ratio_of_the_request() -> None:
    low, clip = part(image(1), detail="low"), part(http.video_url(1, 2, 28, 28))
    for parts, ratio in (([low, low], 0.9), ([low, clip], {"image": 0.9, "video": 0.5})):
        body = user(*parts, seed=None, temperature=0.5)
        got = sent(body, options={"low_detail_ratio": 0.9})
        assert got.pop("mm_processor_kwargs")["tokencomp"]["ratio"] == ratio and got == body


def test_video_files_share_the_pixels_that_images_leave() -> None:
    """Each could have those of a whole request, so that 32 clips took 32 times the limit."""
    limits = Limits(max_pixels=10_000, max_total_pixels=25_000)
    clip, still = part(data(b"any", "video/mp4")), part(image(100))
    for parts, pixels in (([clip], 25_000), ([clip, still, clip], 7_500), ([clip] * 4, 6_250)):
        for chosen in ({}, {"frames": 8}):
            body = user(*parts, media_io_kwargs={"video": chosen} if chosen else None)
            asked = {"media_io_kwargs": {"video": {**chosen, "pixels": pixels}}}
            assert sent(body, limits) == {**body, **asked}


# -- what was saved, and what waits ----------------------------------------------------------------


def answering(kind: str, *bodies: bytes) -> Any:
    """Return a middleware before a vLLM whose processor saved 60 of 80 tokens of a clip."""
    saved = Saved("kcenter", {"ratio": 0.75}, {"video": (80, 20)}, True)
    client = SimpleNamespace(
        shutdown=None, generate=lambda prompt, *_: prompts.append(prompt), errored=False
    )
    prompts: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            return
        await receive()
        client.generate({"prompt": 1, "tokencomp": saved}, "an id")
        assert prompts == [{"prompt": 1}]  # nothing of ours reaches the engine
        headers = [
            (b"content-type", kind.encode()),
            (b"id", dict(scope["headers"])[b"x-request-id"]),
        ]
        if "json" in kind:
            headers.append((b"content-length", str(sum(map(len, bodies))).encode()))
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for body in bodies:
            await send(
                {"type": "http.response.body", "body": body, "more_body": body != bodies[-1]}
            )

    guard = vllm(app=app)
    state = SimpleNamespace(engine_client=client)
    asyncio.run(guard({"type": "lifespan", "app": SimpleNamespace(state=state)}, None, None))  # type: ignore[arg-type]
    return guard


TOKENS, TEXT = {"prompt_tokens": 30, "completion_tokens": 2}, 'He said "usage":{} and left.'
WANTED = {
    "visual_tokens_before": 80, "visual_tokens_after": 20, "ratio": 0.75, "reducer": "kcenter",
    "merge": True, "requested": {"ratio": 0.75},
}  # fmt: skip


def test_an_entry_says_why_nothing_was_removed() -> None:
    whole = Saved("auto", {"budget": 512}, {"image": (256, 256)})
    assert "budget" in whole.as_usage()["reason"]
    assert "reason" not in Saved("auto", {"budget": 512}, {"image": (900, 512)}).as_usage()
    assert "reason" not in Saved("none", {}, {"image": (256, 256)}).as_usage()


def test_the_usage_and_the_log_say_what_was_saved(caplog: pytest.LogCaptureFixture) -> None:
    """In whole answers and in events; a text that looks like the field is not changed."""
    dumps = functools.partial(json.dumps, separators=(",", ":"))
    whole = {"choices": [{"message": {"content": TEXT}}], "usage": TOKENS}
    with caplog.at_level(logging.INFO, "vllm.tokencomp"):
        answer = ask(answering("application/json", dumps(whole).encode()), user("a"))
    assert json.loads(answer.content) == {**whole, "usage": {**TOKENS, "tokencomp": WANTED}}
    assert answer.headers["content-length"] == str(len(answer.content))
    assert answer.headers["id"] == answer.headers["x-request-id"]  # vLLM's is that of the log
    (line,) = (record.getMessage() for record in caplog.records)
    assert " 200 " in line and f"id={answer.headers['id']} " in line
    assert line.endswith("reducer=kcenter ratio=0.75 merge=on visual=80->20")
    chunks = [{"choices": [{"delta": {"content": TEXT}}], "usage": None},
              {"choices": [], "usage": TOKENS}]  # fmt: skip
    events = [b"data: %s\n\n" % dumps(chunk).encode() for chunk in chunks]
    answer = ask(answering("text/event-stream", *events, b"data: [DONE]\n\n"), user("a"))
    first, last, done = answer.content.removesuffix(b"\n\n").split(b"\n\n")
    assert first + b"\n\n" == events[0] and done == b"data: [DONE]"
    assert json.loads(last.removeprefix(b"data: "))["usage"] == {**TOKENS, "tokencomp": WANTED}


# -- errors of vLLM -------------------------------------------------------------------------------


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
    def guard(module: str, late: bool = False) -> VllmGuard:
        return vllm(app=Vllm(raised_in(module, kind("/secret/path")), late))

    answer = ask(guard("vllm.multimodal.video"), b"{}")
    assert answer.status == 400 and "secret" not in answer.message
    for app in (guard("vllm.v1.engine.core_client"), guard("vllm.multimodal", late=True)):
        with pytest.raises(kind):
            ask(app, b"{}")


def test_refusals_of_the_loader_of_videos_keep_their_status() -> None:
    assert ask(vllm(app=Vllm(RequestError("too large", 413))), b"{}").status == 413
    with pytest.raises(RequestError):  # after the answer has begun
        ask(vllm(app=Vllm(RequestError("too large", 413), late=True)), b"{}")
    with pytest.raises(TypeError):  # a mistake of the server
        ask(vllm(app=Vllm(raised_in("vllm.multimodal.video", TypeError()))), b"{}")


# -- roles ----------------------------------------------------------------------------------------

ROUTER = {"router_key": "a secret"}
SENT = [("x-tokencomp-router", "a secret")]


def test_transfer_parameters_are_for_routers() -> None:
    """They name hosts to which the engine connects; in a wrong form they would end it."""
    asked = {"remote_host": "192.0.2.1", "do_remote_prefill": True}
    wrong = [("x-tokencomp-router", "another")]
    for name in ("kv_transfer_params", "ec_transfer_params"):
        direct = user("a", **{name: asked})
        assert ask(vllm(), direct).status == 403
        assert ask(vllm(rules=ROUTER), direct).status == 403
        assert ask(vllm(rules=ROUTER), direct, headers=wrong).status == 403
        assert ask(vllm(), direct, headers=SENT).status == 403  # a server without a router
        assert sent(direct, rules=ROUTER, headers=SENT) == direct
        assert sent(user("a", **{name: None}))
        for value in (asked, "text"):  # vLLM reads them here too
            for hidden in (
                {"vllm_xargs": {name: value}},
                {"sampling_params": {"extra_args": {name: value}}},
            ):
                body = user("a", **hidden)
                assert ask(vllm(), body).status == 403
                assert ask(vllm(rules=ROUTER), body, headers=SENT).status == 400
        assert ask(vllm(rules=ROUTER), user("a", **{name: "text"}), headers=SENT).status == 400


def test_grids_and_names_of_media_are_for_routers() -> None:
    """vLLM reads pickled tensors from texts, and names are entries of caches that all share."""
    grid = {"type": "image_embeds", "image_embeds": {"image_grid_thw": [1, 4, 6]}, "uuid": "a"}
    clip = {"type": "video_embeds", "video_embeds": {"video_grid_thw": [1, 4, 6]}, "uuid": "b"}
    named = {**part(image(1)), "uuid": "c"}
    body = user(grid, clip, named)
    assert sent(body, rules=ROUTER, headers=SENT) == body
    for alone in (grid, clip, named, {k: v for k, v in grid.items() if k != "uuid"}):
        assert ask(vllm(), user(alone)).status == 400
    wrong = [
        {**grid, "image_embeds": value}
        for value in ("AAAA", {"image_grid_thw": "AAAA"}, {"image_embeds": {}}, [1, 4, 6], None)
    ]
    wrong += [{**grid, **more} for more in (
        {"image_embeds": {"image_grid_thw": numbers}} for numbers in (
            [1, -16, -16], [1, 0, 6], [1, 4.0, 6], [1, 4], [True, 4, 6], [1, "4", 6],
        )
    )]  # fmt: skip
    wrong += [{**grid, **more} for more in (
        {"image_url": {"url": "file:///a"}}, {"video_embeds": {"x": "AAAA"}}, {"type": "text"},
    )]  # fmt: skip
    for alone in wrong:
        assert ask(vllm(rules=ROUTER), user(alone), headers=SENT).status == 400, alone


def signed(prompt: Any, key: str = "a secret", **more: Any) -> dict[str, Any]:
    """What a prefill hands over for a prompt, as a router gets it."""
    params = {
        "do_remote_prefill": True, "remote_num_tokens": 4, "remote_block_ids": ([1, 2],),
        "remote_host": "192.0.2.1", "remote_port": 5600, **more,
    }  # fmt: skip
    mark = marks.mark_of(marks.hash_of(prompt), params, key)
    passed: dict[str, Any] = json.loads(json.dumps({**params, "tokencomp": mark}))
    return passed


@pytest.fixture
def fresh(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """No parameters were used before."""
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))


PROMPT = {"prompt_token_ids": [1, 2, 2, 3], "mm_hashes": {"image": ["a", "b"]}}


def test_a_decode_takes_the_blocks_of_its_own_prompt_only(fresh: None) -> None:
    """Connectors move blocks by number, whatever the tokens in them."""
    others = [
        {**PROMPT, "prompt_token_ids": [1, 2, 3]},  # another ratio
        {**PROMPT, "mm_hashes": {"image": ["a", "c"]}},  # another reducer
        {**PROMPT, "mm_hashes": {"image": ["b", "a"]}},
        {**PROMPT, "mm_hashes": {"video": ["a", "b"]}},
        {"prompt_token_ids": [1, 2, 2, 3]},  # a text
    ]
    for params in (None, {}, {"do_remote_decode": True}):
        marks.check_transfer(PROMPT, params)
    for other in others:
        with pytest.raises(RequestError, match="4 tokens there") as caught:
            marks.check_transfer(other, signed(PROMPT), "a secret")
        assert caught.value.status == 409  # the decode can answer it alone
    with pytest.raises(RequestError, match="without 'tokencomp'"):
        marks.check_transfer(PROMPT, {"do_remote_prefill": True, "remote_num_tokens": 4})
    with pytest.raises(RequestError, match="earlier turn"):
        marks.check_transfer(PROMPT, {"do_remote_decode": True, "remote_block_ids": [[1]]})


def test_parameters_of_a_transfer_are_for_one_use(fresh: None) -> None:
    """The prefill frees the blocks: a second decode would read those of another prompt."""
    params = signed(PROMPT)
    marks.check_transfer(PROMPT, params, "a secret")
    again = signed(PROMPT, remote_request_id="another")  # a second prefill of the same prompt
    marks.check_transfer(PROMPT, again, "a secret")
    with pytest.raises(RequestError, match="used before") as caught:
        marks.check_transfer(PROMPT, params, "a secret")
    assert caught.value.status == 409


def test_parameters_of_a_transfer_end_with_the_lease(
    fresh: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    params, now = signed(PROMPT), time.time()
    monkeypatch.setattr(time, "time", lambda: now + 31)
    with pytest.raises(RequestError, match="31 s old"):
        marks.check_transfer(PROMPT, params, "a secret")
    config = SimpleNamespace(kv_connector_extra_config={"kv_lease_duration": 60})
    lease = marks.lease_of(SimpleNamespace(kv_transfer_config=config))
    marks.check_transfer(PROMPT, params, "a secret", lease)


@pytest.mark.parametrize("change", [
    {"remote_host": None}, {"remote_host": "192.0.2.2"}, {"remote_port": 1}, {"more": 1},
    {"remote_block_ids": "abc"}, {"remote_block_ids": [[1, 3]]}, {"remote_block_ids": [[1]]},
    {"remote_num_tokens": 3},
])  # fmt: skip
def test_changed_parameters_of_a_transfer_are_refused(fresh: None, change: dict[str, Any]) -> None:
    """vLLM reads other blocks, or none and counts them as read, or its engine ends."""
    with pytest.raises(RequestError, match="were changed"):
        marks.check_transfer(PROMPT, {**signed(PROMPT), **change}, "a secret")
    later = signed(PROMPT)
    later["tokencomp"] = str(float(later["tokencomp"][:5]) + 1) + later["tokencomp"][5:]
    for params in (signed(PROMPT, "another key"), later):
        with pytest.raises(RequestError, match="were changed"):
            marks.check_transfer(PROMPT, params, "a secret")


def test_a_grid_must_be_that_of_the_encoder() -> None:
    """With as many rows, positions would be wrong; with others, the engine would end."""
    consumer = SimpleNamespace(ec_transfer_config=SimpleNamespace(is_ec_consumer=True))
    for reported, given, taken in (
        ([1, 16, 22], [1, 16, 22], True), ([1, 16, 22], [1, 22, 16], False),
        ([1, 16, 22], [1, 32, 32], False), (None, [1, 16, 22], False),
    ):  # fmt: skip
        metadata = {} if reported is None else {"metadata": {"image_grid_thw": reported}}
        item = {"image_grid_thw": SimpleNamespace(data=torch.tensor(given))}
        prompt = {"mm_hashes": {"image": ["b"]}, "mm_kwargs": {"image": [item]}}
        sampling = SimpleNamespace(extra_args={"ec_transfer_params": {"b": metadata}})
        with contextlib.nullcontext() if taken else pytest.raises(RequestError, match="reported"):
            roles.check_grids(prompt, sampling, consumer)


def test_a_grid_needs_rows_that_an_encoder_has_reported() -> None:
    """Without pixels nothing can be encoded, and the engine would end."""
    grid = {"image_grid_thw": torch.tensor([1, 4, 6]), "tokencomp_image": 0}
    pixels = {"pixel_values": 0, **grid}
    consumer = SimpleNamespace(ec_transfer_config=SimpleNamespace(is_ec_consumer=True))
    other = SimpleNamespace(ec_transfer_config=None)
    blocks = {"kv_transfer_params": {"do_remote_prefill": True}}
    rows = {"ec_transfer_params": {"b": {"metadata": {"image_grid_thw": [1, 4, 6]}}}}
    for items, config, extra, taken in (
        ([pixels, grid], consumer, rows, True), ([grid, pixels], consumer, rows, False),
        ([None, grid], consumer, rows, True), ([None, pixels], other, None, True),
        ([pixels, {"image_embeds": 0}], other, {}, True), ([grid, grid], consumer, rows, False),
        ([pixels, grid], consumer, None, False), ([pixels, grid], other, rows, False),
        ([grid, grid], other, blocks, False), ([grid, grid], consumer, blocks, False),
    ):  # fmt: skip
        prompt = {"mm_hashes": {"image": ["a", "b"]}, "mm_kwargs": {"image": items}}
        sampling = SimpleNamespace(extra_args=extra)
        with contextlib.nullcontext() if taken else pytest.raises(RequestError, match="pixels"):
            roles.check_grids(prompt, sampling, config)


def test_the_prefill_signs_what_it_hands_over(fresh: None) -> None:
    """Through vLLM's client, as a server calls it."""
    prompt = {
        "prompt_token_ids": [1, 2], "mm_hashes": {"image": ["a"]}, "mm_kwargs": {},
        "tokencomp": Saved("kcenter", {"ratio": 0.75}, {"image": (80, 20)}),
    }  # fmt: skip
    handed = {"do_remote_prefill": True, "remote_num_tokens": 2}

    async def generate(prompt: Any, sampling: Any, *_: Any) -> Any:
        yield SimpleNamespace(kv_transfer_params=None)
        yield SimpleNamespace(kv_transfer_params=handed)

    client = SimpleNamespace(shutdown=None, generate=generate, errored=False)
    outputs: list[Any] = []
    params: list[Any] = [{"do_remote_decode": True}]

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "lifespan":
            sampling = SimpleNamespace(extra_args={"kv_transfer_params": params[0]})
            async for output in client.generate(dict(prompt), sampling, "an id"):
                outputs.append(output.kv_transfer_params)
            await Vllm()(scope, receive, send)

    guard = vllm(app=app)
    state = SimpleNamespace(engine_client=client)
    asyncio.run(guard({"type": "lifespan", "app": SimpleNamespace(state=state)}, None, None))  # type: ignore[arg-type]
    assert ask(guard, user("a")).status == REACHED
    assert outputs[0] is None and outputs[1].items() >= handed.items()
    unsigned = {"do_remote_prefill": True, "tokencomp": "a"}
    for given, status in ((outputs[1], REACHED), (outputs[1], 409), (unsigned, 400)):
        params[0] = given
        assert ask(guard, user("a")).status == status
