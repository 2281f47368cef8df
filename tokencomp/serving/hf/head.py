"""What the head of a request must have before its body is read, on every engine."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.types import Scope

from tokencomp.serving.bind import Bind
from tokencomp.serving.hf.errors import RequestError

OPEN_PATHS = ("/health", "/ping", "/metrics")  # for probes and monitoring, which have no key


def is_open(scope: Scope) -> bool:
    """Whether a request needs no key, because it only asks how the server is."""
    return scope["path"] in OPEN_PATHS and scope["method"] in ("GET", "HEAD")


def check_head(scope: Scope, bind: Bind) -> None:
    """Check host name, length of the body, key and content type.

    Raises
    ------
    RequestError
        With status 403, 400, 401 or 415. The rest of the connection must not be read after it.
    """
    headers = Headers(scope=scope)
    for host in headers.getlist("host") or [""]:
        if problem := bind.refusal(host):
            raise RequestError(problem, 403)
    # A proxy may believe the other header, and take what follows the body for another request.
    if "transfer-encoding" in headers and "content-length" in headers:
        raise RequestError("Content-Length beside Transfer-Encoding: send one of them.")
    if is_open(scope):
        return
    if not bind.accepts(headers.get("authorization", "")):
        raise RequestError("missing or wrong API key (Authorization: Bearer KEY).", 401)
    content_type = headers.get("content-type", "").partition(";")[0].strip().lower()
    # Browsers let any web page send other types than this one to any server.
    if scope["method"] == "POST" and content_type != "application/json":
        raise RequestError("send Content-Type: application/json.", 415)


def has_body(scope: Scope) -> bool:
    """Whether the head of a request announces a body."""
    headers = Headers(scope=scope)
    return "transfer-encoding" in headers or headers.get("content-length", "0") != "0"
