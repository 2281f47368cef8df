"""A router for one prefill and one decode of vLLM, to show the requests; not for production.

    pip install uvicorn starlette httpx
    PREFILL=http://127.0.0.1:8100 DECODE=http://127.0.0.1:8200 python router.py 8000

Every chat completion goes to the prefill for one token, and with its `kv_transfer_params` to the
decode. If the prefill cannot be reached, the decode answers alone. If the decode answers 500, it
could not load the KV cache: the prefill ended meanwhile, or did not answer its first contact within
the five seconds of vLLM. Then both are asked again, once.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

CHAT = "/v1/chat/completions"
HANDS_ON = {"do_remote_decode": True, "do_remote_prefill": False}
TRANSFER = ("kv_transfer_params", "ec_transfer_params")


async def chat(request: Request) -> Response:
    """Ask the prefill, then stream the answer of the decode."""
    head = {"authorization": request.headers.get("authorization", "")}
    try:
        body: dict[str, Any] = json.loads(await request.body())
        if any(name in body for name in TRANSFER):  # of a client, not of a prefill
            return Response("transfer parameters are the router's", 403)
    except (ValueError, TypeError):
        return Response("the body is not JSON", 400)
    client: httpx.AsyncClient = request.app.state.client
    try:
        answer = await answered(client, body, head)
        if answer.status_code == 500:
            await answer.aclose()
            answer = await answered(client, body, head)
    except httpx.TransportError:
        return Response("the decode ended or cannot be reached; send the request again", 502)
    kind = answer.headers.get("content-type")
    return StreamingResponse(answer.aiter_raw(), answer.status_code, media_type=kind)


async def answered(
    client: httpx.AsyncClient, body: dict[str, Any], head: dict[str, str]
) -> httpx.Response:
    """The answer of the decode as a stream, or what else than 200 the prefill says."""
    short = {"max_tokens": 1, "stream": False, "kv_transfer_params": HANDS_ON}
    first = {k: v for k, v in body.items() if k not in ("stream_options", "max_completion_tokens")}
    asked = client.build_request(
        "POST", os.environ["PREFILL"] + CHAT, json=first | short, headers=head
    )
    handed: dict[str, Any] = {}
    try:
        answer = await client.send(asked, stream=True)
        if answer.status_code != 200:  # also refusals: the decode would refuse the same
            return answer
        handed["kv_transfer_params"] = json.loads(await answer.aread())["kv_transfer_params"]
    except httpx.TransportError:  # the decode answers alone
        pass
    asked = client.build_request(
        "POST", os.environ["DECODE"] + CHAT, json=body | handed, headers=head
    )
    return await client.send(asked, stream=True)


async def health(_: Request) -> Response:
    """The router is there, and every role has probes."""
    return Response()


app = Starlette(routes=[Route(CHAT, chat, methods=["POST"]), Route("/health", health)])
app.state.client = httpx.AsyncClient(timeout=600)

if __name__ == "__main__":
    uvicorn.run(app, host=os.environ.get("HOST", "127.0.0.1"), port=int(sys.argv[1]))
