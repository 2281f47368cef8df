"""The router: which requests prefill and decode get, and who answers where one of them fails."""

from __future__ import annotations

import json
from typing import Any

import pytest

pytest.importorskip("starlette")
pytest.importorskip("httpx")

import httpx
from support.serving.doors import ROUTER_KEY, Answer, ask, user

from tokencomp.errors import OptionError
from tokencomp.serving.bind import Bind
from tokencomp.serving.router import Router

HANDED = {"do_remote_prefill": True, "remote_block_ids": [[1, 2]]}
ASKED = user("a", max_completion_tokens=9, min_tokens=3, n=2)


class Nodes:
    """Prefills and decodes that answer their numbers, or a status, or not at all."""

    def __init__(self, prefills: int = 1, decodes: int = 1, **failing: Any) -> None:
        self.failing, self.seen = failing, list[tuple[str, dict[str, Any], Any]]()
        urls = ([f"http://{role}{i}" for i in range(count)]
                for role, count in (("p", prefills), ("d", decodes)))  # fmt: skip
        self.router = Router(*urls, ROUTER_KEY, Bind(host=""))
        self.router.client = httpx.AsyncClient(transport=httpx.MockTransport(self._answer))

    def _answer(self, request: Any) -> Any:
        host, fails = request.url.host, self.failing.get(request.url.host)
        if request.url.path == "/health":
            return httpx.Response(200 if fails is None else 503)
        body = json.loads(request.content)
        self.seen.append((host, body, request.headers))
        status = fails(body) if callable(fails) else fails
        if status == "dead":
            raise httpx.ConnectError("dead")
        handed = {"kv_transfer_params": HANDED} if host[0] == "p" else {}
        content = json.dumps({"by": host, **handed}).encode()
        return httpx.Response(status or 200, stream=httpx.ByteStream(content))

    def ask(self, body: Any = ASKED) -> Answer:
        return ask(
            self.router, body, headers=[("authorization", "Bearer a"), ("x-request-id", "7")]
        )

    @property
    def order(self) -> list[str]:
        return [host + "+" * ("kv_transfer_params" in body) for host, body, _ in self.seen]


def test_the_decode_answers_with_what_the_prefill_hands_over() -> None:
    nodes = Nodes()
    assert json.loads(nodes.ask().content) == {"by": "d0"}
    (_, first, head), (_, second, _) = nodes.seen
    short = {"max_tokens": 1, "n": 1, "stream": False}
    given = {"do_remote_decode": True, "do_remote_prefill": False}
    assert first == {"messages": ASKED["messages"], **short, "kv_transfer_params": given}
    assert second == {**ASKED, "kv_transfer_params": HANDED}
    names = ("authorization", "x-request-id", "x-forwarded-for", "x-tokencomp-router")
    assert [head[name] for name in names] == ["Bearer a", "7", "127.0.0.1", ROUTER_KEY]


def once(status: Any) -> Any:
    """Fails where blocks are handed over."""
    return lambda body: status if "kv_transfer_params" in body else None


@pytest.mark.parametrize(("failing", "order", "status"), [
    ({"p0": "dead"}, ["p0+", "p1+", "d0+"], 200), ({"p0": 503}, ["p0+", "p1+", "d0+"], 200),
    ({"p0": "dead", "p1": "dead"}, ["p0+", "p1+", "d0"], 200), ({"p0": 500}, ["p0+", "d0"], 200),
    ({"p0": 400}, ["p0+"], 400), ({"d0": 400}, ["p0+", "d0+"], 400),
    # Blocks are handed to one decode alone, which may have read them before it failed.
    ({"d0": once(409)}, ["p0+", "d0+", "d0"], 200), ({"d0": once(500)}, ["p0+", "d0+", "d0"], 200),
    ({"d0": "dead"}, ["p0+", "d0+", "d0", "d1"], 200),
    ({"d0": "dead", "d1": "dead"}, ["p0+", "d0+", "d0", "d1"], 502),
])  # fmt: skip
def test_another_server_answers_where_one_fails(failing: Any, order: Any, status: int) -> None:
    nodes = Nodes(2, 2, **failing)
    answer = nodes.ask()
    assert (answer.status, nodes.order) == (status, order)
    assert status != 200 or json.loads(answer.content)["by"] == order[-1].strip("+")


def test_the_node_with_the_fewest_requests_is_asked() -> None:
    nodes = Nodes(2, 2)
    with nodes.router.prefills[0].busy(), nodes.router.decodes[0].busy():
        nodes.ask()
    nodes.ask()
    assert nodes.order == ["p1+", "d1+", "p0+", "d0+"]


def test_clients_have_no_rights_of_the_router() -> None:
    """Names of media are entries of caches that all share; parameters name hosts."""
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    grid = {"type": "image_embeds", "image_embeds": {"image_grid_thw": [1, 4, 6]}, "uuid": "a"}
    for body, status in (
        (user({**picture, "uuid": "a"}), 400), (user(grid), 400),
        (user("a", kv_transfer_params=HANDED), 403), (user("a", ec_transfer_params={}), 403),
        (user("a", vllm_xargs={"kv_transfer_params": HANDED}), 403),
    ):  # fmt: skip
        nodes = Nodes()
        assert nodes.ask(body).status == status and not nodes.seen


def test_health_needs_a_decode() -> None:
    for failing, status in (({}, 200), ({"p0": 500}, 200), ({"d0": 500}, 503)):
        answer = ask(Nodes(**failing).router, path="/health", method="GET")
        assert answer.status == status


@pytest.mark.parametrize(("key", "decodes", "api_key"), [
    (None, ["http://a"], None), ("a", ["http://a"], "a"), ("a", [], None), ("a", ["a:8000"], None),
    ("a", ["ftp://a"], None), ("a", ["http://"], None),
])  # fmt: skip
def test_wrong_arguments(key: Any, decodes: Any, api_key: Any) -> None:
    with pytest.raises(OptionError):
        Router([], decodes, key, Bind(api_key=api_key))
