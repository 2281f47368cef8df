"""Which routes and which parts of messages reach vLLM behind the middleware, in any version."""

from __future__ import annotations

import contextlib
import json
import logging
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vllm is not installed")

from starlette.testclient import TestClient
from support.serving import http
from vllm.entrypoints.launchers.app import build_app
from vllm.utils.argparse_utils import FlexibleArgumentParser

from tokencomp.serving.limits import RequestError
from tokencomp.serving.spec import ServerOptions
from tokencomp.serving.vllm.request_checks import check_body
from tokencomp.serving.vllm.rules import Rules

KEY = "secret"
PARSERS = ("launchers", "common")  # packages of vLLM's command line in 0.32 and 0.33
OPEN = {"/health", "/ping", "/metrics"}
SERVED = {*OPEN, "/v1/chat/completions", "/v1/models", "/version"}
GUARD = ["--middleware", "tokencomp.serving.vllm.middleware.VllmGuard"]


def arguments_of(*words: str) -> Any:
    """Return what vLLM's command line makes of the words."""
    for package in PARSERS:
        with contextlib.suppress(ModuleNotFoundError):
            module = import_module(f"vllm.entrypoints.{package}.cli_args")
            return module.make_arg_parser(FlexibleArgumentParser()).parse_args([*words])
    raise AssertionError("vLLM has its command line elsewhere")


@pytest.fixture
def application(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Function that returns vLLM's application without an engine, with all routes that it has."""
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    monkeypatch.setenv("VLLM_SERVER_DEV_MODE", "1")
    monkeypatch.delenv("TOKENCOMP_RULES", raising=False)

    async def healthy() -> None:
        pass

    def build(*arguments: str) -> Any:
        app = build_app(arguments_of(*arguments), ("generate",))
        app.state.engine_client = SimpleNamespace(check_health=healthy)
        return app

    level = logging.root.level
    yield build
    logging.root.setLevel(level)  # a package of vLLM's routes raises it for all loggers


def asked(app: Any, **headers: str) -> dict[tuple[str, str], int]:
    """Return the status of the answer to every method of every route."""
    client = TestClient(app, raise_server_exceptions=False)
    statuses = {}
    for route in app.routes:
        path = route.path.replace("{", "").replace("}", "")
        for method in {"GET", "POST", "OPTIONS", *(getattr(route, "methods", None) or ())}:
            answer = client.request(method, path, headers=headers, content=b"{}")
            statuses[path, method] = answer.status_code
    return statuses


def test_without_the_key_only_probes_answer(application: Any) -> None:
    """Use without the key: vLLM itself asks for it below some paths only."""
    statuses = asked(application(*GUARD), **{"Content-Type": "application/json"})
    assert len({path for path, _ in statuses}) > 20 and {path for path, _ in statuses} >= SERVED
    for (path, method), status in statuses.items():
        probe = path in OPEN and method in ("GET", "HEAD")
        assert status == (200 if probe else 401), (path, method)
    # The test can fail: vLLM alone answers where it has no key.
    alone = asked(application(), **{"Content-Type": "application/json"})
    assert {path for (path, _), status in alone.items() if status not in (401, 404)} > OPEN


def test_with_the_key_only_documented_paths_answer(application: Any) -> None:
    """Paths whose bodies nothing checks, where media may have any size."""
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
    statuses = asked(application(*GUARD), **headers)
    for (path, method), status in statuses.items():
        assert (status != 404) == (path in SERVED), (path, method)
        assert status != 401


def test_cors_and_prefixes_are_vllms(application: Any) -> None:
    origin = "http://a.example"
    app = application(*GUARD, "--allowed-origins", f'["{origin}"]', "--root-path", "/api")
    client = TestClient(app, raise_server_exceptions=False)
    asks = {"Access-Control-Request-Method": "POST"}
    for path in ("/v1/chat/completions", "/api/v1/chat/completions"):
        answer = client.options(path, headers={"Origin": origin, **asks})
        assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == origin
        assert (
            client.options(path, headers={"Origin": "http://b.example", **asks}).status_code == 400
        )
    key = {"Authorization": f"Bearer {KEY}"}
    for path in ("/version", "/api/version"):
        assert client.get(path).status_code == 401
        assert client.get(path, headers=key).status_code == 200
    assert client.get("/api/health").status_code == 200
    assert client.get("/api/tokenizer_info", headers=key).status_code == 404


def chat_parser() -> tuple[set[str], Any]:
    """Return the types of parts that this vLLM knows, and its function that reads a part."""
    for name in ("vllm.renderers.chat_utils.chat_message", "vllm.renderers.chat_utils"):
        with contextlib.suppress(ModuleNotFoundError, AttributeError):
            module: Any = import_module(name)
            reader = "parse_chat_message_content_mm_part"
            reader = reader if hasattr(module, reader) else f"_{reader}"
            return set(module.MM_PARSER_MAP), getattr(module, reader)
    raise AssertionError("vLLM has its parsers elsewhere")


LISTED = {"text", "refusal", "image_url", "video_url"}
OTHER = {"image", "video", "audio", "file", "data", "image_pil", "prompt_embeds"}


@pytest.mark.parametrize("kind", sorted({*OTHER, *chat_parser()[0]}))
def test_no_part_reaches_vllm_that_nobody_listed(kind: str) -> None:
    """vLLM reads parts without a type by their other keys. A type of a later version is refused."""
    read, url, passed = chat_parser()[1], http.image_url(1), 0
    image = {"type": "image_url", "image_url": {"url": url}}
    for value in ("text", url, {"url": url}, [url], {"url": "file:///etc/passwd"}, {}):
        named: dict[str, Any] = {"type": kind, kind: value}
        parts = [
            named, {kind: value}, {"type": None, kind: value}, {"type": [kind], kind: value},
            {**named, "uuid": "A"}, {kind: value, "uuid": "A"}, {**named, "data": "AAAA"},
            {"type": "text", "text": "a", kind: value}, {**image, kind: value},
            {"type": "text", "text": named}, {"type": "text", "text": [named]},
            {"type": "tool_result", "content": [named]}, {"type": "image_url", "image_url": named},
        ]  # fmt: skip
        for part in parts:
            for content in ([part], part, [[part]]):
                body = json.dumps({"messages": [{"role": "user", "content": content}]}).encode()
                try:
                    passed_on = check_body(body, Rules(), ServerOptions()).body(Rules())
                    assert json.loads(passed_on)["messages"] == json.loads(body)["messages"]
                except RequestError as error:
                    assert error.status == 400
                    continue
                passed += 1
                assert content == [part] and kind in LISTED
                found, taken = read(part)
                assert found in LISTED and taken == (url if "url" in found else part[found])
    assert (passed > 0) == (kind in LISTED)
