"""HTTP/1.1 connections with limits, for uvicorn with either of its parsers.

The transformers server parses with h11. vLLM takes httptools where it is installed, which costs
less per streamed token; the plugin puts `Connection` in place of uvicorn's class there.

    new connection ──► waiting for a head ──► request runs ──► waiting for the next head
                       (oldest first; one too many, or 15 s: closed)
"""

from __future__ import annotations

import asyncio
from typing import Any, ClassVar

import h11
from uvicorn.protocols.http.auto import AutoHTTPProtocol
from uvicorn.protocols.http.h11_impl import H11Protocol

MAX_WAITING = 256  # connections without a request; each takes a file descriptor
MAX_CONNECTIONS = 512  # in all, on transformers: many systems allow a process 1,024 descriptors
MAX_ENGINE_CONNECTIONS = 2048  # on vLLM, which runs more requests and raises its soft limit
HEAD_SECONDS = 15.0  # in which a connection must send the head of its next request
SEND_SECONDS = 60.0  # in which a client must take a full buffer of its answer
H11_HEAD = 1 << 16  # bytes of a head, unless the operator sets another number
FREE_PIECES, PIECE_BYTES = 4096, 64  # chunks of a body, and how large more must be on average


class Pieces:
    """Counts the chunks of a body: a small one costs as much as a large one."""

    def __init__(self) -> None:
        self.count = self.size = 0

    def add(self, size: int) -> bool:
        """Count a chunk; return whether the body has too many small ones."""
        # A body of 32 MB in chunks of one byte would cost 32 million events of the parser.
        self.count, self.size = self.count + 1, self.size + size
        return self.count > FREE_PIECES + self.size // PIECE_BYTES


class Bounded:
    """Mixin before a protocol class of uvicorn: number of connections, and time of heads.

    uvicorn's keep-alive time ends with the first byte, so it does not limit slow heads. A client
    that opens many connections closes the oldest ones that wait, and not those of running requests.
    """

    waiting: ClassVar[dict[Any, None]]
    """Connections of the process without a running request, oldest first."""
    most: ClassVar[int]
    """Connections in all; a request on one more is answered with 503."""
    config: Any
    conn: Any
    cycle: Any
    limit_concurrency: int | None
    loop: Any
    transport: Any
    _writing: asyncio.TimerHandle | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # uvicorn answers 503 above this number; without it, descriptors run out for all clients.
        self.limit_concurrency = self.most
        if isinstance(self, H11Protocol):
            largest = self.config.h11_max_incomplete_event_size or H11_HEAD
            self.conn = PiecewiseConnection(h11.SERVER, largest)

    def connection_made(self, transport: Any) -> None:
        """Start the timer of the first request."""
        super().connection_made(transport)  # type: ignore[misc]  # of uvicorn's class
        self._wait_for_request()

    def connection_lost(self, exc: Exception | None) -> None:
        self.waiting.pop(self, None)
        super().connection_lost(exc)  # type: ignore[misc]  # of uvicorn's class

    def data_received(self, data: bytes) -> None:
        super().data_received(data)  # type: ignore[misc]  # of uvicorn's class
        self._note_request()

    def on_response_complete(self) -> None:
        """Start the timer of the next request, which may have arrived already."""
        self._wait_for_request()
        super().on_response_complete()  # type: ignore[misc]  # of uvicorn's class
        self._note_request()

    def send_400_response(self, msg: str) -> None:
        """Answer bytes that are no HTTP; the application, if it runs, can no longer answer."""
        super().send_400_response(msg)  # type: ignore[misc]  # of uvicorn's class
        if self.cycle is not None:
            self.cycle.disconnected = True
            self.cycle.message_event.set()

    def pause_writing(self) -> None:
        super().pause_writing()  # type: ignore[misc]  # of uvicorn's class
        # A client that never reads would keep its answer, and what the answer holds, for ever.
        self._writing = self.loop.call_later(SEND_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()  # type: ignore[misc]  # of uvicorn's class
        if self._writing is not None:
            self._writing.cancel()

    @property
    def _idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _wait_for_request(self) -> None:
        self.waiting[self] = None
        # A client that opens many connections closes its oldest ones, since they wait the longest.
        while len(self.waiting) > MAX_WAITING:
            oldest = next(iter(self.waiting))
            del self.waiting[oldest]
            oldest.transport.abort()  # `close` would first wait for the client to read
        self.loop.call_later(HEAD_SECONDS, self._close_unless_started, self.cycle)

    def _note_request(self) -> None:
        if not self._idle:
            self.waiting.pop(self, None)

    def _close_unless_started(self, last: Any) -> None:
        # The timer outlives its request: act only if no other request has begun since.
        if self.cycle is last and self._idle:  # each request has another cycle
            self.transport.abort()


class PiecewiseConnection(h11.Connection):
    """h11's connection with a limit on the chunks of a body."""

    def next_event(self) -> Any:
        """Return what has arrived. Raises `RemoteProtocolError` for too many chunks."""
        event = super().next_event()
        if isinstance(event, h11.Request):
            self._pieces = Pieces()
        elif isinstance(event, h11.Data):
            crumbs = self._pieces.add(len(event.data))
            if crumbs and self.our_state is h11.SEND_RESPONSE:  # else the connection ends anyway
                raise h11.RemoteProtocolError("too many chunks")
        return event


class BoundedH11(Bounded, H11Protocol):
    """uvicorn's protocol on h11, with the limits."""

    waiting, most = {}, MAX_CONNECTIONS


class Connection(Bounded, AutoHTTPProtocol):  # type: ignore[misc, valid-type]  # chosen by uvicorn
    """The protocol that uvicorn chooses by itself, with the limits of a server on vLLM."""

    waiting, most = {}, MAX_ENGINE_CONNECTIONS

    def on_message_begin(self) -> None:  # of httptools
        super().on_message_begin()
        self._pieces = Pieces()

    def on_body(self, body: bytes) -> None:  # of httptools
        if not self._pieces.add(len(body)):
            super().on_body(body)
        elif not self.transport.is_closing():
            self.send_400_response("Invalid HTTP request: too many chunks.")


def bound_engine() -> None:
    """Let servers that uvicorn starts in this process with its usual protocol have the limits."""
    from uvicorn import config

    config.HTTP_PROTOCOLS["auto"] = f"{__name__}:{Connection.__name__}"
