"""Routes that say what the server is: models, version, health, metrics and a first page."""

from __future__ import annotations

import time
from typing import Any

from fastapi import Request
from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from tokencomp import __version__
from tokencomp.serving.first_page import first_page
from tokencomp.serving.hf.engine import Engine
from tokencomp.serving.hf.errors import RequestError


class About:
    """The handlers of these routes.

    Parameters
    ----------
    engine
        The engine that answers requests.
    name
        Model name that clients see.
    keyed
        Whether requests need a key.
    """

    def __init__(self, engine: Engine, name: str, keyed: bool) -> None:
        self.engine, self.name, self.keyed = engine, name, keyed
        self.started = int(time.time())

    async def health(self) -> Response:
        """Answer 200 while the engine answers requests, and 503 after it has failed."""
        return Response(status_code=200 if self.engine.healthy else 503)

    async def metrics(self) -> Response:
        """Answer with all metrics in the text format of Prometheus."""
        text = generate_latest(self.engine.metrics.registry)
        return Response(text, media_type=CONTENT_TYPE_LATEST)

    async def version(self) -> Any:
        """Answer with the version of this package."""
        return {"version": __version__}

    async def models(self) -> Any:
        """List the served model."""
        return {"object": "list", "data": [self._card()]}

    async def model(self, name: str) -> Any:
        """Describe the served model with its default reducer and ratio."""
        self.check_name(name)
        return self._card()

    def check_name(self, name: str) -> None:
        """Raise `RequestError` (404) for the name of another model."""
        if name != self.name:
            raise RequestError(f"model {name!r}: this server has {self.name!r}.", 404)

    def _card(self) -> dict[str, Any]:
        return {
            "id": self.name,
            "object": "model",
            "created": self.started,
            "owned_by": "tokencomp",
            "max_model_len": self.engine.max_model_len,
            "tokencomp": self.engine.options.default.describe(),
        }

    async def page(self, request: Request) -> Response:
        """Say in plain text what is served, and how to ask."""
        setting = self.engine.options.default.describe()
        address = f"{request.url.scheme}://{request.url.netloc}"
        return first_page(self.name, setting, address, self.keyed)
