"""The server process: uvicorn with limits on connections, and what it logs at its start."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import logging
import logging.config
from typing import Any

import h11
import PIL
import uvicorn
from starlette.types import ASGIApp
from uvicorn.config import LOGGING_CONFIG
from uvicorn.protocols.http.h11_impl import H11Protocol

from tokencomp.serving.bind import Bind
from tokencomp.serving.hf.engine import Engine
from tokencomp.serving.hf.media import Limits

logger = logging.getLogger("tokencomp.serving")

HEAD_SECONDS = 15.0  # in which a connection must send the head of its next request
SEND_SECONDS = 60.0  # in which a client must take a full buffer of its answer
MAX_CONNECTIONS = 1024
DESCRIPTORS = MAX_CONNECTIONS + 256  # also for pipes of decoders, files, and refused connections
SAFE_PILLOW = 13
FREE_PIECES, PIECE_BYTES = 4096, 64  # parts of a body, and how large more must be on average


class PiecewiseConnection(h11.Connection):
    """Refuses a body in very many small chunks, each of which costs as much as a large one."""

    def next_event(self) -> Any:
        """Return what has arrived. Raises `RemoteProtocolError` for too many chunks."""
        event = super().next_event()
        if isinstance(event, h11.Request):
            self._pieces = self._bytes = 0
        elif isinstance(event, h11.Data):
            self._pieces, self._bytes = self._pieces + 1, self._bytes + len(event.data)
            crumbs = self._pieces > FREE_PIECES + self._bytes // PIECE_BYTES
            if crumbs and self.our_state is h11.SEND_RESPONSE:  # else the connection ends anyway
                raise h11.RemoteProtocolError("too many chunks")
        return event


class TimedProtocol(H11Protocol):
    """HTTP/1.1 that closes connections on which no request starts, or whose answer is not read.

    uvicorn's keep-alive time ends with the first byte that arrives, so that it does not limit how
    long a client may take for the head of a request.
    """

    _writing: asyncio.TimerHandle | None = None

    def __init__(self, config: uvicorn.Config, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self.conn = PiecewiseConnection(h11.SERVER)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # TCP transports only
        """Start the time of the first request."""
        super().connection_made(transport)
        self._wait_for_request()

    def on_response_complete(self) -> None:
        """Start the time of the next request, which may have arrived already."""
        self._wait_for_request()
        super().on_response_complete()

    def _wait_for_request(self) -> None:
        self.loop.call_later(HEAD_SECONDS, self._close_unless_started, self.cycle)

    def _close_unless_started(self, last: Any) -> None:
        if self.cycle is last:  # each request has a cycle of its own
            self.transport.abort()  # `close` would first wait for the client to read

    def send_400_response(self, msg: str) -> None:
        """Answer bytes that are no HTTP; the application, if it runs, can no longer answer."""
        super().send_400_response(msg)
        if self.cycle is not None:
            self.cycle.disconnected = True
            self.cycle.message_event.set()

    def pause_writing(self) -> None:
        """Start the time in which the client must read."""
        super().pause_writing()
        self._writing = self.loop.call_later(SEND_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        """End this time."""
        super().resume_writing()
        if self._writing is not None:
            self._writing.cancel()


def server(app: ASGIApp, bind: Bind) -> uvicorn.Server:
    """Return the server of an application."""
    allow_descriptors()
    config = uvicorn.Config(
        app,
        host=bind.host,
        port=bind.port,
        http=TimedProtocol,
        ws="none",
        log_config=log_config(),
        access_log=False,  # `Guard` logs requests, with their tokens
        server_header=False,
        limit_concurrency=MAX_CONNECTIONS,
        timeout_graceful_shutdown=bind.shutdown_timeout,
    )
    return uvicorn.Server(config)


def allow_descriptors() -> None:
    """Raise this process's limit on open files to what its connections need, as far as allowed.

    Most systems start processes with 1,024, but let them raise this number themselves.
    """
    with contextlib.suppress(ImportError):  # not on Windows
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft == resource.RLIM_INFINITY or soft >= DESCRIPTORS:
            return
        allowed = DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, DESCRIPTORS)
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
        if allowed < DESCRIPTORS:
            logger.warning(
                "this process may open %d files; %d connections need %d (ulimit -Hn, LimitNOFILE).",
                allowed, MAX_CONNECTIONS, DESCRIPTORS,
            )  # fmt: skip


def log_config() -> dict[str, Any]:
    """Return uvicorn's logging, which also prints the messages of this package."""
    config = copy.deepcopy(LOGGING_CONFIG)
    config["formatters"]["default"]["fmt"] = "%(asctime)s %(levelprefix)s %(message)s"
    config["loggers"]["tokencomp"] = {"handlers": ["default"], "level": "INFO", "propagate": False}
    return config


def log_start(engine: Engine, name: str, limits: Limits, bind: Bind) -> None:
    """Log what is served, how it is compressed, and which limits hold."""
    logging.config.dictConfig(log_config())
    if int(PIL.__version__.partition(".")[0]) < SAFE_PILLOW:
        logger.warning(
            "Pillow %s reads the EXIF data of an image without a bound: a file of 1 MB can take "
            "gigabytes of memory. Install pillow>=%d (Python 3.11), or serve trusted clients only.",
            PIL.__version__, SAFE_PILLOW,
        )  # fmt: skip
    model, options, default = engine.model, engine.options, engine.options.default
    described = default.describe()
    requests = f"up to {options.max_ratio:g}" if options.per_request else "fixed"
    logger.info(
        "serving %r (%s) on %s in %s: reducer %s, ratio %s, ratio of requests %s",
        name, type(model).__name__, model.device, str(model.dtype).removeprefix("torch."),
        described.get("reducer"), default.shown_ratio, requests,
    )  # fmt: skip
    logger.info(
        "limits: %d tokens, %d requests per batch, %d waiting; media of %d MiB, %d items, %g "
        "megapixels each and %g in all, %d frames, %g s of decoding; files %s",
        engine.max_model_len, engine.waiting.max_batch, engine.waiting.max_waiting,
        limits.max_bytes >> 20, limits.max_items, limits.max_pixels / 1e6,
        limits.max_total_pixels / 1e6, limits.frames, limits.decode_seconds,
        limits.allowed_path or "off",
    )  # fmt: skip
    logger.info(
        "API key %s; host names %s; shutdown within %d s",
        "on" if bind.api_key else "off",
        ", ".join(("localhost", *bind.allowed_hosts))
        if bind.loopback or bind.allowed_hosts
        else "all",
        bind.shutdown_timeout,
    )
