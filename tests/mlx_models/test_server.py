"""mlx_vlm.server under `tokencomp serve --engine mlx`: batches, the prefix cache, refusals."""

from __future__ import annotations

import base64
import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import pytest
from support.console import run

from tokencomp import zoo

if importlib.util.find_spec("mlx_vlm") is None:
    pytest.skip("mlx-vlm is not installed", allow_module_level=True)

ROWS = json.loads((zoo.SAMPLES / "questions.json").read_text())
IMAGES = [row for row in ROWS if row["kind"] == "image"]


def in_float32(name: str, folder: Path) -> str:
    """A copy of an embedded model that batches change by rounding of float32 alone."""
    import mlx.core as mx

    shutil.copytree(zoo.model_path(name), folder)
    for file in folder.glob("*.safetensors"):
        weights = {key: x.astype(mx.float32) for key, x in mx.load(str(file)).items()}
        mx.eval(weights)
        mx.save_safetensors(str(file), weights, {"format": "mlx"})
    return str(folder)


@contextmanager
def server(name: str, ratio: str, log: Path, *options: str, **env: str) -> Iterator[str]:
    """The address of a server with one model."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "tokencomp", "serve", "--engine", "mlx", "--model", name]
    command += ["--ratio", ratio, "--port", str(port), *options]
    command += ["--", "--max-tokens", "6"]
    with log.open("w") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=file, env={**os.environ, "HF_HUB_OFFLINE": "1", **env}
        )
        try:
            yield wait(f"http://127.0.0.1:{port}", process, log)
        finally:
            process.terminate()
            process.wait(30)


def wait(address: str, process: Any, log: Path) -> str:
    for _ in range(600):
        assert process.poll() is None, log.read_text()
        try:
            urllib.request.urlopen(f"{address}/health", timeout=5).close()
            return address
        except HTTPError:  # without the key
            return address
        except OSError:
            time.sleep(0.5)
    raise AssertionError(log.read_text())


def ask(address: str, name: str, messages: list[Any]) -> tuple[str, int, list[float]]:
    """The answer, tokens of the prompt that came from the cache, and its log-probabilities."""
    body = {"model": name, "max_tokens": 6, "temperature": 0, "logprobs": True}
    request = urllib.request.Request(
        f"{address}/v1/chat/completions",
        json.dumps({**body, "messages": messages}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=300) as response:
        reply = json.load(response)
    usage = reply["usage"]
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    answer = reply["choices"][0]
    scores = [token["logprob"] for token in answer["logprobs"]["content"]]
    return answer["message"]["content"], cached, scores


def prefilled(log: Path) -> list[int]:
    """Tokens of every prompt that a server has computed."""
    return [int(n) for n in re.findall(r"Prefill completed.* prompt_tokens=(\d+)", log.read_text())]


def turn(row: Any) -> dict[str, Any]:
    data = base64.b64encode((zoo.SAMPLES / row["media"]).read_bytes()).decode()
    image = {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{data}"}}
    return {
        "role": "user",
        "content": [image, {"type": "text", "text": row["question"]}],
    }


def close(answers: list[Any], others: list[Any]) -> bool:
    """Whether answers are the same, and their log-probabilities but for rounding."""
    pairs = list(zip(answers, others, strict=True))
    return all(a[0] == b[0] and a[2] == pytest.approx(b[2], abs=1e-3) for a, b in pairs)


@pytest.mark.parametrize("model", ["tiny-qwen3-5", "tiny-qwen2-vl"])
def test_batches_and_prefix_cache(model: str, tmp_path: Path) -> None:
    """Answers alone, together, and from the cache are the same, with fewer prompt tokens.

    The cache outlives a server on disk. Other settings do not find what it keeps.
    """
    name, disk = in_float32(model, tmp_path / "model"), str(tmp_path / "disk")
    log, text = tmp_path / "log", [{"role": "user", "content": "What color is the sky? " * 12}]
    cache = {"APC_ENABLED": "1", "APC_DISK_PATH": disk}
    with server(name, "0.75", log, **cache) as address:
        alone = [ask(address, name, [turn(row)]) for row in IMAGES]
        words = ask(address, name, text)
        asked = [*([turn(row)] for row in IMAGES * 2), text]
        with ThreadPoolExecutor(6) as pool:
            together = list(pool.map(lambda messages: ask(address, name, messages), asked))
        talk = [turn(IMAGES[0]), {"role": "assistant", "content": alone[0][0]}]
        talk.append({"role": "user", "content": "Is there a pink square? " * 8})
        second = ask(address, name, talk)
    assert close(together, [*alone, *alone, words])
    assert all(row[0] for row in alone)
    with server(name, "0.75", tmp_path / "again", **cache) as address:
        again = [ask(address, name, messages) for messages in (talk, text)]
    assert close(again, [second, words]) and all(row[1] > 0 for row in again)
    with server(name, "0", tmp_path / "whole", **cache) as address:
        whole = [ask(address, name, messages) for messages in (talk, text, [turn(IMAGES[0])])]
    assert [row[0] for row in whole] == [second[0], words[0], alone[0][0]]
    assert close([whole[1]], [words]) and not any(row[1] for row in whole)
    assert prefilled(log)[0] < prefilled(tmp_path / "whole")[-1]


def test_the_server_merges_as_it_was_told(tmp_path: Path) -> None:
    """The default is that of `patch`; a quantized cache has no weights."""
    name, found = in_float32("tiny-qwen2-vl", tmp_path / "model"), {}
    for i, options in enumerate(((), ("--merge", "on"), ("--merge", "off"))):
        with server(name, "0.75", tmp_path / str(i), *options) as address:
            found[options[1:]] = [ask(address, name, [turn(row)]) for row in IMAGES]
    assert close(found[()], found["on",]) and not close(found[()], found["off",])
    log = tmp_path / "quantized"
    with server(name, "0.75", log, KV_BITS="8") as address:
        assert ask(address, name, [turn(IMAGES[0])])[0]
    assert "merge='auto' drops here: a quantized KV cache" in log.read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--budget", "64", "--ratio", "0.5"), "Leave one out"),
        (("--budget", "0"), "from 1 to"),
        (("--max-batch", "4"), "mlx_vlm.server after"),
        (("--ratio", "1.5"), "0, 1"),
        (("--reducer", "fastv"), "cannot run inside an engine"),
        (("--", "--reranker-model", "x"), "uncompressed"),
        (("--", "--draft-model=x"), "drafts"),
        (("--", "--draft-m", "x"), "drafts"),
        (("--", "--rel"), "--reload: the server would run in another process, uncompressed"),
    ],
)
def test_what_the_server_cannot_do(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("serve", "--engine", "mlx", *arguments) == 2
    assert message in capsys.readouterr().err


def test_the_server_asks_for_the_key(tmp_path: Path) -> None:
    """mlx_vlm.server has another variable for it."""
    name = "tiny-qwen2-vl"
    with server(name, "0.5", tmp_path / "log", TOKENCOMP_API_KEY="secret") as address:
        for key, status in (("", 401), ("other", 401), ("secret", 200)):
            headers = {"Authorization": f"Bearer {key}"} if key else {}
            request = urllib.request.Request(f"{address}/v1/models", headers=headers)
            try:
                with urllib.request.urlopen(request, timeout=30) as response:
                    assert response.status == status
            except HTTPError as error:
                assert error.code == status
        with pytest.raises(HTTPError, match="401"):
            ask(address, name, [turn(IMAGES[0])])
