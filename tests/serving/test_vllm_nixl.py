"""Prefill and decode as two servers over NIXL, with the requests that a router sends."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http.client import HTTPException
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vllm is not installed")
pytest.importorskip("nixl", reason="nixl is not installed (pip install nixl)")

import yaml
from support.serving import http
from support.serving.processes import Served, started
from support.serving.transfer import (
    CHAT,
    GIVEN,
    ROUTER,
    encoded,
    handed_on,
    post,
    prefilled,
    question,
    same,
)  # fmt: skip

DEPLOY = Path(__file__).parents[2] / "examples" / "deploy"


@contextlib.contextmanager
def role(folder: Path, root: Path, name: str) -> Iterator[Served]:
    """A service of compose.nodes.yaml as a process, with another model and another port."""
    service = yaml.safe_load((DEPLOY / "compose.nodes.yaml").read_text())["services"][name]
    words = [re.sub(r"\$\{\w+:-(.*?)\}", r"\1", word) for word in service["command"]]
    changed = ("--engine", "--model", "--port")
    words = [word for word in words if word.partition("=")[0] not in changed]
    (root / name).mkdir(exist_ok=True)
    port = str(http.free_port())
    more = {"VLLM_NIXL_SIDE_CHANNEL_PORT": port, **ROUTER}
    with started("vllm", folder, root / name, *words, **more) as server:
        yield server


@contextlib.contextmanager
def router(prefill: Served, decode: Served) -> Iterator[Served]:
    """A router before both; it refuses requests without the key of clients."""
    words = ["--prefill", prefill.url, "--decode", decode.url]
    env = {**ROUTER, "TOKENCOMP_API_KEY": decode.key}
    log = decode.root / "router.log"
    with http.process(log, *words, name="route", ready="/health", **env) as (url, _):
        yield replace(decode, url=url, routed=False)


def test_prefill_and_decode_over_nixl(tiny_folder: Any, tmp_path: Path) -> None:
    folder = tiny_folder("qwen2_vl")
    with role(folder, tmp_path, "decode") as decode:
        with role(folder, tmp_path, "prefill") as prefill:
            for number in range(20):  # cold, and warm where a body comes again
                body = question(number % 15)
                status, got = handed_on(prefill, decode, body)
                assert status == 200, got
                assert same(post(prefill, body)[1], got), number
            assert encoded(prefill) and not encoded(decode)
            check_refusals(prefill, decode)
            lost = prefilled(prefill, question(33))
            with router(prefill, decode) as front:
                check_router(front, prefill, decode)
                os.killpg(prefill.process.pid, signal.SIGKILL)
                assert post(front, question(42))[0] == 200  # by the decode alone
        status, answer = post(decode, {**question(33), "kv_transfer_params": lost})
        assert status in (409, 500) and "error" in answer  # the router asks another prefill
        status, alone = post(decode, question(33))
        assert status == 200
        with role(folder, tmp_path, "prefill") as prefill:
            for number in (33, 34):
                status, got = handed_on(prefill, decode, question(number))
                assert status == 200, got
                assert same(post(prefill, question(number))[1], got)
                assert number == 34 or same(alone, got)
            check_death_of_the_decode(folder, tmp_path, prefill, decode)


def check_death_of_the_decode(folder: Path, root: Path, prefill: Served, decode: Served) -> None:
    """A killed decode ends its requests with an error; another one answers exactly."""
    body = {**question(50), "max_tokens": 3000}
    handed = prefilled(prefill, question(51))  # blocks that the killed decode never reads
    begun = http.metric(decode.url, "vllm:generation_tokens_total")
    with router(prefill, decode) as front, ThreadPoolExecutor(2) as pool:
        whole = pool.submit(post, front, body)
        events = pool.submit(stream, front, body)
        while http.metric(decode.url, "vllm:generation_tokens_total") < begun + 20:
            assert not whole.done() and not events.done()
        os.killpg(decode.process.pid, signal.SIGKILL)
        assert whole.result()[0] == 502
        assert "[DONE]" not in events.result()
        assert post(front, question(51))[0] == 502
    with role(folder, root, "decode") as another, router(prefill, another) as front:
        for number in (50, 51):
            status, got = post(front, question(number))
            assert status == 200 and same(post(prefill, question(number))[1], got)
        # A decode takes longer to start than a prefill keeps blocks.
        status, got = post(another, {**question(51), "kv_transfer_params": handed})
        assert status == 409 and "s old" in got["error"]["message"]


def stream(server: Served, body: dict[str, Any]) -> str:
    """What a client has read of an answer in events when it ends, or breaks off."""
    head = {"Content-Type": "application/json", "Authorization": f"Bearer {server.key}"}
    content = json.dumps({**body, "stream": True}).encode()
    text = b""
    with contextlib.suppress(HTTPException, OSError):
        request = urllib.request.Request(server.url + CHAT, content, head)
        with urllib.request.urlopen(request, timeout=300) as answer:
            for line in answer:
                text += line
    return text.decode()


def check_router(front: Served, prefill: Served, decode: Served) -> None:
    """Its answers are those of one process, and metrics by role count an image once."""
    begun = {s.url: visual(s, "prefill") + visual(s, "decode") for s in (prefill, decode)}
    status, got = post(front, question(41))
    assert status == 200
    tokens = got["usage"]["tokencomp"]["visual_tokens_before"]
    rise = [visual(s, r) for s, r in ((prefill, "prefill"), (decode, "decode"))]
    assert [n - begun[s.url] for n, s in zip(rise, (prefill, decode), strict=True)] == [tokens] * 2
    assert same(post(prefill, question(41))[1], got)
    assert post(front, {**question(41), "kv_transfer_params": GIVEN})[0] == 403
    assert post(replace(front, key="wrong"), question(41))[0] == 401
    named = question(41)
    named["messages"][0]["content"][0]["uuid"] = "a"
    assert post(front, named)[0] == 400


def visual(server: Served, role: str) -> float:
    """Visual tokens that a server has counted in a role."""
    lines = http.get(server.url + "/metrics")[1].splitlines()
    found = [line for line in lines if line.startswith("tokencomp_visual_tokens_before_total{")]
    return sum(float(line.split()[-1]) for line in found if f'role="{role}"' in line)


def check_refusals(prefill: Served, decode: Served) -> None:
    """What differs between the roles is refused, and both continue."""
    body = {**question(21), "tokencomp": {"ratio": 0.75}}
    for other in ({"ratio": 0.5}, {"ratio": 0.9}, {"ratio": 0.75, "reducer": "uniform"},
                  {"ratio": 0.75, "merge": False}):  # fmt: skip
        handed = prefilled(prefill, {**body, "tokencomp": other})
        status, answer = post(decode, {**body, "kv_transfer_params": handed})
        assert status == 409 and "prefill and decode differ" in answer["error"]["message"]
    handed = prefilled(prefill, body)
    unmarked = {name: value for name, value in handed.items() if name != "tokencomp"}
    for params in (unmarked, "text", [1]):  # a refused request frees the blocks of the prefill
        assert post(decode, {**body, "kv_transfer_params": params})[0] == 400
    once = {**body, "kv_transfer_params": prefilled(prefill, body)}
    assert post(decode, once)[0] == 200
    status, answer = post(decode, once)  # the prefill has freed the blocks
    assert status == 409 and "used before" in answer["error"]["message"]
    changed = {**prefilled(prefill, body), "remote_host": None}
    assert post(decode, {**body, "kv_transfer_params": changed})[0] == 409
    check_texts(prefill, decode)
    hidden = {**body, "vllm_xargs": {"kv_transfer_params": "text"}}
    assert post(decode, hidden)[0] == 400 and post(decode, body)[0] == 200


def check_texts(prefill: Served, decode: Served) -> None:
    """Prompts without media are signed as well."""
    body = {**question(21), "messages": http.messages("Which colours are in the picture? " * 9)}
    once = {**body, "kv_transfer_params": prefilled(prefill, body)}
    status, got = post(decode, once)
    assert status == 200 and same(post(prefill, body)[1], got)
    assert post(decode, once)[0] == 409
