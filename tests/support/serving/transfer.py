"""Requests of a router to prefill and decode, and how their answers are compared."""

from __future__ import annotations

import contextlib
import json
import math
import urllib.error
import urllib.request
from typing import Any

from support.serving import http
from support.serving.processes import Served

CHAT = "/v1/chat/completions"
GIVEN: dict[str, Any] = {"do_remote_decode": True, "do_remote_prefill": False}
LONGEST = 8
ROUTER_KEY = "the router's"
ROUTER = {"TOKENCOMP_ROUTER_KEY": ROUTER_KEY}


def post(server: Served, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """Return status and JSON of an answer."""
    head = {"Content-Type": "application/json", "Authorization": f"Bearer {server.key}"}
    if server.routed:
        head["X-TokenComp-Router"] = ROUTER_KEY
    request = urllib.request.Request(server.url + CHAT, json.dumps(body).encode(), head)
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, _json(error.read())


def _json(content: bytes) -> dict[str, Any]:
    with contextlib.suppress(ValueError):
        found: dict[str, Any] = json.loads(content)
        return found
    return {"error": {"message": content.decode()}}


def question(number: int) -> dict[str, Any]:
    """One to three images and clips at all ratios, dropped or merged."""
    urls = [http.image_url(number, 224 + 28 * (number % 3), 168)]
    urls += [http.image_url(90 + number, 112, 168), http.video_url(number, 6)][: number % 3]
    options: Any = {"ratio": (0, 0.5, 0.75, 0.9)[number % 4], "merge": number % 2 == 0}
    named = {} if number % 5 == 4 else {"tokencomp": options}
    return {
        "model": "tiny", "messages": http.messages(http.QUESTION, *urls), "max_tokens": LONGEST,
        "temperature": 0, "ignore_eos": True, "logprobs": True, **named,
    }  # fmt: skip


def prefilled(server: Served, body: dict[str, Any]) -> dict[str, Any]:
    """What the prefill hands over, as routers ask for it."""
    status, answer = post(server, {**body, "max_tokens": 1, "kv_transfer_params": GIVEN})
    assert status == 200, answer
    found: dict[str, Any] = answer["kv_transfer_params"]
    return found


def words(answer: dict[str, Any]) -> list[tuple[str, float]]:
    content = answer["choices"][0]["logprobs"]["content"]
    assert len(content) == LONGEST
    return [(word["token"], word["logprob"]) for word in content]


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two answers have equal tokens and, to 1e-4, log-probabilities."""
    pairs = zip(words(one), words(other), strict=True)
    return all(a[0] == b[0] and math.isclose(a[1], b[1], abs_tol=1e-4) for a, b in pairs)


def encoded(server: Served) -> float:
    return http.metric(server.url, "tokencomp_reduce_seconds_total")


def handed_on(
    prefill: Served, decode: Served, body: dict[str, Any], tries: int = 6
) -> tuple[int, dict[str, Any]]:
    """An answer over both.

    A busy machine can exceed vLLM's five seconds of the first contact (500), or the lease of the
    blocks while the decode reads its first media (409).
    """
    for _ in range(tries):
        handed = prefilled(prefill, body)
        status, answer = post(decode, {**body, "kv_transfer_params": handed})
        if status == 200:
            break
    return status, answer
