"""What `GET /` answers on every engine: what is served, and a line to ask with."""

from __future__ import annotations

import json
from typing import Any

from starlette.responses import PlainTextResponse

from tokencomp import __version__

QUESTION = {"max_tokens": 16, "messages": [{"role": "user", "content": "Hello"}]}


def first_page(name: str, setting: dict[str, Any], address: str, keyed: bool) -> PlainTextResponse:
    """Plain text with the model, the setting and one line for curl.

    Parameters
    ----------
    name
        Of the model, as clients see it.
    setting
        Its default reducer and ratio.
    address
        Of the server, such as http://127.0.0.1:8000.
    keyed
        Whether requests need a key.
    """
    key = ' -H "Authorization: Bearer $TOKENCOMP_API_KEY"' if keyed else ""
    text = (
        f"tokencomp {__version__} serves {name} with {json.dumps(setting)}\n\n"
        f"curl {address}/v1/chat/completions{key} "
        f"-H 'Content-Type: application/json' -d '{json.dumps(QUESTION)}'\n"
    )
    return PlainTextResponse(text, headers={"X-Content-Type-Options": "nosniff"})
