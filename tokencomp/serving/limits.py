"""Limits of a request, and the error of refused requests."""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokencomp.errors import TokenCompError

MAX_MESSAGE = 500  # characters of an error message
MAX_STRUCTURE = 1_000_000  # JSON objects, lists and their elements in a body; each costs memory
MAX_FORM = 64 << 10  # characters of a schema or grammar, which takes many times as much memory
FORMS = ("response_format", "structured_outputs", "tools")  # fields that become grammars
CLIENT_LEFT = 499  # status of a request whose client has disconnected


class RequestError(TokenCompError, ValueError):
    """A request that cannot be served, with an HTTP status: 413 for what exceeds a limit."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status

    def body(self) -> dict[str, Any]:
        """OpenAI's error; a message may quote the request: shortened, surrogates escaped."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        text = str(self).encode("utf-8", "backslashreplace").decode()
        text = text if len(text) <= MAX_MESSAGE else text[: MAX_MESSAGE - 1] + "…"
        return {"error": {"message": text, "type": kind, "param": None, "code": self.status}}


@dataclass(frozen=True)
class Limits:
    """Limits of one request; a few bytes can decode to very many pixels."""

    allowed_path: Path | None = None  # folder of `file:` URLs; None refuses them
    max_bytes: int = 64 << 20  # of one encoded image or video
    max_pixels: int = 50_000_000  # of one image or frame
    max_total_pixels: int = 300_000_000  # of all images and sampled frames
    frames: int = 32  # sampled from a video, by this policy (`tokencomp.inputs.video.frames`)
    policy: str = ""  # evenly spaced
    # A decoder produces all frames of a video, and for a few bytes of an animation a whole canvas.
    max_decoded: int = 36_000  # frames
    max_decoded_pixels: int = 20_000_000_000
    max_animated_pixels: int = 1_000_000_000
    decode_seconds: float = 60.0  # for all media of a request
    decode_memory: int = 3 << 30  # bytes of the process that decodes a video file
    max_items: int = 32  # images and videos
    max_body: int = 128 << 20  # bytes of one body
    max_bodies: int = 512 << 20  # bytes of all bodies
    body_seconds: float = 120.0  # in which a body must arrive


def check_structure(content: bytes | bytearray) -> None:
    """Refuse a JSON body of many values: parsed, they take a hundred times its memory."""
    if sum(content.count(mark) for mark in (b"{", b"[", b",")) > MAX_STRUCTURE:
        raise RequestError(f"the body has more than {MAX_STRUCTURE} JSON values.", 413)


def check_form(name: str, text: bytes) -> None:
    """Refuse a large field that becomes a grammar, which would stop the answers of others."""
    if len(text) > MAX_FORM:
        raise RequestError(f"{name}: more than {MAX_FORM} characters. Send a smaller one.")


class Deadline:
    """Deadline for decoding the media of a request, `seconds` from now."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.cancelled = seconds, False
        self._then: Callable[[], None] | None = None
        self.start()

    def start(self) -> None:
        """Restart the timer, because the work begins only now."""
        self._end = time.monotonic() + self.seconds

    def cancel(self) -> None:
        """Expire permanently: the client has disconnected. Thread-safe."""
        self.cancelled = True
        if self._then is not None:
            self._then()

    def when_cancelled(self, then: Callable[[], None]) -> None:
        """Call `then` when the client disconnects, or now if it has; replaces earlier callbacks."""
        self._then = then
        if self.cancelled:
            then()

    def remaining(self) -> float:
        """Remaining seconds, at least 0."""
        return 0.0 if self.cancelled else max(self._end - time.monotonic(), 0.0)

    def check(self) -> None:
        """Raise `RequestError` (413) after the deadline."""
        if self.remaining() <= 0:
            raise RequestError(
                f"the media were not decoded within {self.seconds:g} s. Send fewer or smaller "
                "media.",
                413,
            )


class TimedReader(io.BytesIO):
    """A file of `content` whose reads fail after the deadline.

    Decoders read incrementally, so this also ends loops inside of libraries.
    """

    def __init__(self, content: bytes, deadline: Deadline) -> None:
        super().__init__(content)
        self.deadline = deadline

    def read(self, size: int | None = -1, /) -> bytes:
        self.deadline.check()
        return super().read(size)
