"""Which of vLLM's own routes answer behind the middleware, in whatever version of vLLM."""

from __future__ import annotations

import contextlib
import logging
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vllm is not installed")

from starlette.testclient import TestClient
from vllm.entrypoints.launchers.app import build_app
from vllm.utils.argparse_utils import FlexibleArgumentParser

KEY = "secret"
PARSERS = ("launchers", "common")  # packages of vLLM's command line in 0.32 and 0.33
OPEN = {"/health", "/ping", "/metrics"}
SERVED = {*OPEN, "/v1/chat/completions", "/v1/models", "/version"}
GUARD = ["--middleware", "tokencomp.serving.vllm.middleware.Guard"]


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
    statuses = asked(application(*GUARD), **{"Content-Type": "application/json"})
    assert len({path for path, _ in statuses}) > 20 and {path for path, _ in statuses} >= SERVED
    for (path, method), status in statuses.items():
        probe = path in OPEN and method in ("GET", "HEAD")
        assert status == (200 if probe else 401), (path, method)
    # The test can fail: vLLM alone answers where it has no key.
    alone = asked(application(), **{"Content-Type": "application/json"})
    assert {path for (path, _), status in alone.items() if status not in (401, 404)} > OPEN


def test_with_the_key_only_documented_paths_answer(application: Any) -> None:
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
    statuses = asked(application(*GUARD), **headers)
    for (path, method), status in statuses.items():
        assert (status != 404) == (path in SERVED), (path, method)
        assert status != 401
