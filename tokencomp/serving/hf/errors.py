"""Errors that a client sees, with their HTTP status."""

from __future__ import annotations

from tokencomp.errors import TokenCompError


class RequestError(TokenCompError, ValueError):
    """A request that cannot be served; `status` is the HTTP status of the answer."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status
