"""Routes that vLLM lacks: `GET /v1/models/{id}`, which OpenAI's clients call, and `GET /`."""

from __future__ import annotations

import json
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tokencomp.serving.first_page import first_page
from tokencomp.serving.hf.errors import RequestError

MODELS = "/v1/models"


def names_model(scope: Scope) -> bool:
    """Whether a request asks for the card of one model."""
    return scope["method"] == "GET" and scope["path"].startswith(f"{MODELS}/")


async def send_card(app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer with the card of one model, as it stands in the application's list of all.

    Raises
    ------
    RequestError
        404, no model of the list has that name.
    """
    name, cards = scope["path"].removeprefix(f"{MODELS}/"), await _cards(app, scope, receive)
    if name not in cards:
        raise RequestError(f"model {name!r}: this server has {', '.join(cards)}.", 404)
    await JSONResponse(cards[name])(scope, receive, send)


async def send_page(
    app: ASGIApp, scope: Scope, receive: Receive, send: Send, setting: dict[str, Any], keyed: bool
) -> None:
    """Answer with the first page of the server, see `first_page`."""
    name, url = next(iter(await _cards(app, scope, receive))), Request(scope).url
    page = first_page(name, setting, f"{url.scheme}://{url.netloc}", keyed)
    await page(scope, receive, send)


async def _cards(app: ASGIApp, scope: Scope, receive: Receive) -> dict[str, Any]:
    """The application's models by name.

    Raises
    ------
    RequestError
        503, the application does not list them, because it starts or ends.
    """
    body, status = bytearray(), 0

    async def collect(message: Message) -> None:
        nonlocal status
        status = message.get("status", status)
        body.extend(message.get("body", b""))

    await app({**scope, "path": MODELS, "raw_path": MODELS.encode()}, receive, collect)
    if status != 200:
        raise RequestError("the server does not list its models yet. Ask again.", 503)
    return {card["id"]: card for card in json.loads(body)["data"]}
