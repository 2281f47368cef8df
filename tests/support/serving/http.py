"""A server process on the loopback interface, and the media that clients send."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from support.serving import media as tiny
from support.serving.files import encoded

START_SECONDS = 400
QUESTION = "What color is the circle?"


def free_port() -> int:
    """Return a port that is free at the moment."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextlib.contextmanager
def server(log: Path, *arguments: Any, **env: str) -> Iterator[str]:
    """Run `tokencomp serve …` until the block ends; yield its base URL."""
    with process(log, *arguments, **env) as (url, _):
        yield url


@contextlib.contextmanager
def process(
    log: Path, *arguments: Any, name: str = "serve", ready: str = "/health", **env: str
) -> Iterator[tuple[str, subprocess.Popen]]:
    """Run `tokencomp NAME …` until the block ends; yield its base URL and its process."""
    port = free_port()
    command = [sys.executable, "-m", "tokencomp", name, "--port", port, *arguments]
    with log.open("w") as out:
        running = subprocess.Popen(
            list(map(str, command)), stdout=out, stderr=subprocess.STDOUT,
            env={**os.environ, "HF_HUB_OFFLINE": "1", **env}, start_new_session=True,
        )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    try:
        _wait(url + ready, running, log)
        yield url, running
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(running.pid, signal.SIGTERM)
        try:
            running.wait(timeout=20)
        except subprocess.TimeoutExpired:
            os.killpg(running.pid, signal.SIGKILL)
            running.wait()


def _wait(url: str, process: subprocess.Popen, log: Path) -> None:
    """Wait until `url` answers; fail if the process ends before."""
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        assert process.poll() is None, log.read_text()[-4000:]
        with contextlib.suppress(OSError):
            if get(url)[0] == 200:
                return
        time.sleep(0.3)
    raise AssertionError("the server did not start:\n" + log.read_text()[-4000:])


@contextlib.contextmanager
def unreached_urls() -> Iterator[list[str]]:
    """Yield URLs of a local listener, and fail if the server connects to it during the block."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        listener.setblocking(False)
        port = listener.getsockname()[1]
        hosts = ("127.0.0.1", "localhost", "127.1", "[::ffff:127.0.0.1]", "invalid.@127.0.0.1")
        yield [f"http://{host}:{port}/x.png" for host in hosts]
        time.sleep(0.2)
        with contextlib.suppress(BlockingIOError):
            listener.accept()
            raise AssertionError("the server opened a connection that a client requested")


def outside(media: Path, secret: Path) -> list[str]:
    """Return URLs that a server must refuse if it may only read files below `media`."""
    image(secret)
    link = media / "link.png"
    if not link.exists():
        link.symlink_to(secret)
    up = f"file://{media}/../{secret.name}"
    return [
        secret.as_uri(), up, up.replace("..", "%2e%2e"), up.replace("/..", "%2f.."), link.as_uri(),
        "file:///etc/passwd", f"file://localhost{secret}", f"file://{media}", str(secret),
        "ftp://127.0.0.1/x", "nonsense",
    ]  # fmt: skip


def image(path: Path) -> None:
    """Write an image file that any server can decode."""
    tiny.image(1).save(path)


def get(url: str, body: Any = None) -> tuple[int, str]:
    """Return status and body of a GET request, or of a POST request with a JSON body."""
    data = None if body is None else json.dumps(body).encode()
    try:
        request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def metric(url: str, name: str) -> float:
    """Return the sum of a metric over its labels."""
    lines = [line for line in get(url + "/metrics")[1].splitlines() if not line.startswith("#")]
    return sum(float(line.split()[-1]) for line in lines if line.split("{")[0].split()[0] == name)


def image_url(seed: int, width: int = 224, height: int = 224) -> str:
    """Return a random image as a data: URL."""
    return "data:image/png;base64," + _png(tiny.image(seed, width, height))


def video_url(seed: int, frames: int = 8, width: int = 112, height: int = 84) -> str:
    """Return random frames as a data: URL that both engines accept, without loss."""
    parts = [_png(Image.fromarray(f)) for f in tiny.video(seed, frames, width, height)]
    return "data:video/jpeg;base64," + ",".join(parts)


def mp4_url(seed: int, frames: int = 8) -> str:
    """Return an encoded MP4 file as a data: URL."""
    return encoded(tiny.video(seed, frames))


def _png(image: Image.Image) -> str:
    out = io.BytesIO()
    image.save(out, "PNG")
    return base64.b64encode(out.getvalue()).decode()


def messages(text: str, *urls: str) -> list[dict[str, Any]]:
    """Return one user message with the media before the text."""
    parts: list[dict[str, Any]] = []
    for url in urls:
        kind = "video_url" if url.startswith("data:video") else "image_url"
        parts.append({"type": kind, kind: {"url": url}})
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]
