"""A server under load: clients that ask at once, the time to the first token, requests per second.

One `tokencomp serve` process answers all settings, because a request brings its own ratio, so that
the settings of one number of clients differ in nothing else. No two requests have the same media.
"""

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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tokencomp.errors import OptionError

QUESTION = "Describe what you see."
START_SECONDS, ANSWER_SECONDS = 1800, 600


@dataclass(frozen=True)
class Work:
    """What every client asks.

    Attributes
    ----------
    images, side
        Images of a request, and their width and height in pixels.
    tokens
        Longest answer.
    """

    images: int
    side: int
    tokens: int


@contextlib.contextmanager
def server(model: str, arguments: list[str], log: Path) -> Iterator[str]:
    """Run `tokencomp serve` until the block ends; yield its address.

    Raises
    ------
    OptionError
        It does not start; the message has the end of its log.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tokencomp", "serve", "--model", model]
    command += ["--served-model-name", "model", "--port", str(port)]
    command += [*([] if "--ratio" in arguments else ["--ratio", "0"]), *arguments]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
    address = f"http://127.0.0.1:{port}"
    try:
        _wait(address, process, log)
        yield address
    finally:
        stop(process)


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a process that leads a session, and all processes that it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(timeout=60)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < end:
        with contextlib.suppress(OSError), urllib.request.urlopen(address + "/health", timeout=5):
            return
        time.sleep(0.5)
    raise OptionError(f"the server did not start; the end of {log}:\n{log.read_text()[-2000:]}")


def body_of(number: int, ratio: float, work: Work) -> bytes:
    """The request with this number, which chooses its media."""
    body = {
        "model": "model",
        "messages": [{"role": "user", "content": _content(number, work)}],
        "max_tokens": work.tokens,
        "temperature": 0,
        "stream": True,
        "mm_processor_kwargs": {"tokencomp": {"ratio": ratio}},
    }
    return json.dumps(body).encode()


def post(address: str, body: bytes) -> Any:
    """The answer to a request, while it arrives; close it."""
    path, head = f"{address}/v1/chat/completions", {"Content-Type": "application/json"}
    return urllib.request.urlopen(urllib.request.Request(path, body, head), timeout=ANSWER_SECONDS)


def ask(address: str, body: bytes) -> dict[str, Any]:
    """One request: seconds to the first token and in all, and how many pieces of text came.

    A request that fails has the key "error".
    """
    start, first, pieces = time.perf_counter(), None, 0
    try:
        with post(address, body) as answer:
            for line in answer:
                if _has_text(line):
                    first = first or time.perf_counter() - start
                    pieces += 1
    except (OSError, ValueError) as error:
        return {"error": f"{type(error).__name__}: {error}"[:200]}
    total = time.perf_counter() - start
    return {"first": round(first or total, 6), "total": round(total, 6), "pieces": pieces}


def _has_text(line: bytes) -> bool:
    """Whether a line of a streamed answer carries text.

    Raises
    ------
    ValueError
        The line holds an error of the server, or is no JSON.
    """
    text = line.decode().strip().removeprefix("data:").strip()
    if not text or text == "[DONE]":
        return False
    chunk = json.loads(text)
    if "error" in chunk:
        raise ValueError(chunk["error"])
    choices = chunk.get("choices") or [{}]
    return bool(choices[0].get("delta", {}).get("content"))


def _content(number: int, work: Work) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = []
    for k in range(work.images):
        parts.append(image_part(picture(number, k, work.side), "jpeg"))
    return [*parts, {"type": "text", "text": QUESTION}]


def image_part(image: Image.Image, form: str = "png") -> dict[str, Any]:
    """The part of a message that has a picture, as a file of this form."""
    image.save(file := io.BytesIO(), form.upper())
    url = f"data:image/{form};base64,{base64.b64encode(file.getvalue()).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def picture(number: int, k: int, side: int) -> Image.Image:
    """Smooth noise that no other request has."""
    random = np.random.default_rng([number, k])
    small = random.integers(0, 256, (16, 16, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((side, side), Image.Resampling.BICUBIC)


def load(
    address: str, ratio: float, clients: int, requests: int, first: int, work: Work
) -> dict[str, Any]:
    """Requests of one setting from so many clients at once.

    Parameters
    ----------
    first
        Number of the first request; numbers choose the media.

    Returns
    -------
    dict
        "requests", one record each, and "seconds" from the first to the last of them.
    """
    bodies = [body_of(number, ratio, work) for number in range(first, first + requests)]
    with ThreadPoolExecutor(clients) as pool:
        start = time.perf_counter()
        records = list(pool.map(lambda body: ask(address, body), bodies))
        seconds = time.perf_counter() - start
    return {"requests": records, "seconds": round(seconds, 6)}
