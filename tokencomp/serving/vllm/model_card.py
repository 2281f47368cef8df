"""`GET /v1/models/{id}`, which OpenAI's clients call (`models.retrieve`) and vLLM lacks."""

from __future__ import annotations

import json

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

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
    body, status = bytearray(), 0

    async def collect(message: Message) -> None:
        nonlocal status
        status = message.get("status", status)
        body.extend(message.get("body", b""))

    await app({**scope, "path": MODELS, "raw_path": MODELS.encode()}, receive, collect)
    answer = json.loads(body)
    if status == 200:
        name = scope["path"].removeprefix(f"{MODELS}/")
        cards = {card["id"]: card for card in answer["data"]}
        if name not in cards:
            raise RequestError(f"model {name!r}: this server has {', '.join(cards)}.", 404)
        answer = cards[name]
    await JSONResponse(answer, status)(scope, receive, send)
