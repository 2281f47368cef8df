"""Errors that a client sees, with their HTTP status."""

from __future__ import annotations

from typing import Any

from tokencomp.errors import TokenCompError

MAX_MESSAGE = 500
CLIENT_LEFT = 499  # in place of a status, where nobody waits for the answer


class RequestError(TokenCompError, ValueError):
    """A request that cannot be served; `status` is the HTTP status of the answer.

    Whatever reads a part of a request raises it: with 400 for what is malformed or not served, and
    with 413 for what exceeds a limit.
    """

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status

    def body(self) -> dict[str, Any]:
        """Return the error body of OpenAI's API.

        The message may quote the request, so it is shortened, and lone surrogates are escaped.
        """
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        text = str(self).encode("utf-8", "backslashreplace").decode()
        text = text if len(text) <= MAX_MESSAGE else text[: MAX_MESSAGE - 1] + "…"
        return {"error": {"message": text, "type": kind, "param": None, "code": self.status}}
