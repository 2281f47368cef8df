"""Decoding of video files in a process of their own, with limits on its memory and its time.

A demuxer makes tables as long as a file says, and a few hundred bytes can say gigabytes. Limits on
what is decoded do not help there, and neither does an exception: the server itself would be killed.
So each file has a process that ends with it, whatever happens to that process.

The server sends a line of JSON, which has the limits, and the file; the answer is a line of JSON,
which has an error or the shape and times of the frames, and the frames as bytes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from tokencomp.inputs.video import Sampling
from tokencomp.serving.hf.deadline import Deadline
from tokencomp.serving.hf.errors import RequestError
from tokencomp.serving.hf.media import Limits
from tokencomp.serving.hf.video import Clip, decode_container, too_much_memory

GRACE = 5  # seconds after the end of its time when the kernel ends a process that hangs
ENV = {
    "OPENBLAS_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2",  # both reserve memory per core
    "PYTHONSAFEPATH": "1",
}  # fmt: skip


def decode_apart(content: bytes, limits: Limits, deadline: Deadline) -> Clip:
    """Decode a video file as `decode_container` does, in a new process with limited memory."""
    order = {**dataclasses.asdict(limits), "allowed_path": None}
    order["decode_seconds"] = deadline.remaining()
    with _process(deadline) as process:
        assert process.stdin is not None and process.stdout is not None
        with contextlib.suppress(BrokenPipeError), process.stdin:  # if the process has ended
            process.stdin.write(json.dumps(order).encode() + b"\n")
            process.stdin.write(content)
        clip = _answer(process.stdout)
    if clip is None:
        deadline.check()
        raise too_much_memory(limits)
    return clip


@contextlib.contextmanager
def _process(deadline: Deadline) -> Iterator[subprocess.Popen[bytes]]:
    """Run `main` in a process, which is killed at the end of the block or of the deadline."""
    folders = [str(Path(folder).resolve()) for folder in sys.path if folder]  # of this process
    with subprocess.Popen(
        [sys.executable, "-m", "tokencomp.serving.hf.decoder"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, **ENV, "PYTHONPATH": os.pathsep.join(folders)},
        cwd=Path(sys.executable).anchor,  # modules of the working directory are not imported
        start_new_session=True,  # Ctrl-C is for the server, which lets requests end
    ) as process:
        try:
            deadline.when_cancelled(process.kill)
            yield process
        finally:
            process.kill()


def _answer(stream: IO[bytes]) -> Clip | None:
    """Return the clip that a process sends, or None if it ended before it had sent all of it."""
    line = stream.readline()
    if not line.endswith(b"\n"):
        return None
    head: dict[str, Any] = json.loads(line)
    if "error" in head:
        raise RequestError(head["error"], head["status"])
    frames = np.empty(head["shape"], np.uint8)
    view, filled = memoryview(frames).cast("B"), 0
    while filled < len(view):
        count = stream.readinto(view[filled:])  # type: ignore[attr-defined]  # of buffered pipes
        if not count:
            return None
        filled += count
    lists = head["sampling"].items()  # JSON has no tuples
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in lists}
    return frames, Sampling(**fields)


def main() -> None:
    """Decode the video of the standard input."""
    limits = Limits(**json.loads(sys.stdin.buffer.readline()))
    content = sys.stdin.buffer.read()
    with contextlib.suppress(ImportError):
        import av  # noqa: F401  # before the limit, which is for the file
    _limit(limits)
    out = sys.stdout.buffer
    try:
        frames, sampling = decode_container(content, limits, Deadline(limits.decode_seconds))
    except RequestError as error:
        head = {"error": str(error), "status": error.status}
        out.write(json.dumps(head).encode() + b"\n")
        return
    head = {"shape": frames.shape, "sampling": dataclasses.asdict(sampling)}
    out.write(json.dumps(head).encode() + b"\n")
    out.write(memoryview(np.ascontiguousarray(frames)).cast("B"))


def _limit(limits: Limits) -> None:
    """Limit memory and time of this process, where its system can do so (tested on Linux)."""
    with contextlib.suppress(ImportError, OSError, ValueError, AttributeError):
        import resource
        import signal

        signal.alarm(int(limits.decode_seconds) + GRACE)  # ends the process, whatever it does
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        most = _address_space() + limits.decode_memory
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


def _address_space() -> int:
    """Return the bytes of memory that this process has reserved; 0 if that is unknown."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        return pages * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


if __name__ == "__main__":
    main()
