"""What `tokencomp serve --engine hf` refuses: options at its start, and requests of clients."""

from __future__ import annotations

import json
import socket
import time
from typing import Any

import pytest

pytest.importorskip("starlette")
openai = pytest.importorskip("openai")

from support.console import run  # noqa: E402
from support.serving import http  # noqa: E402
from support.serving.http import QUESTION, ask  # noqa: E402


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--reducer", "selector"], "needs trained weights"),
        (["--port", "PORT"], "cannot listen at 127.0.0.1:"),
    ],
)
def test_server_that_cannot_serve_does_not_start(
    tiny_folder: Any, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as occupied:
        occupied.bind(("127.0.0.1", 0))
        occupied.listen()
        port = str(occupied.getsockname()[1])
        args = [port if a == "PORT" else a for a in arguments]
        assert run("serve", "--model", tiny_folder("qwen2_vl"), *args) == 2
    assert message in capsys.readouterr().err


def test_client_that_disconnects_while_it_sends(hf_server: Any) -> None:
    url, _, _, root = hf_server
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as client:
        client.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{"
        )
        time.sleep(0.5)
    time.sleep(0.5)
    assert http.get(url + "/health")[0] == 200
    assert "Traceback" not in (root / "log").read_text()


def bad_media(root: Any) -> list[str]:
    good = http.image_url(1)
    return [
        *http.outside(root / "media", root / "secret.png"), "https://example.com/x.png",
        f"file://{root}/media/none.png",
        "data:image/png,abc", "data:image/png;base64,????", "data:image/png;base64,aGVsbG8=",
        good[: len(good) // 2], "data:video/mp4;base64,aGVsbG8=", "data:video/jpeg;base64,aGVsbG8=",
        "data:video/mp4;base64,I0VYVE0zVQojRVhULVgtTUVESUE6VVJJPSJmaWxlOi8vL2V0Yy9wYXNzd2QiCg==",
        "data:image/svg+xml;base64,PHN2Zy8+", http.image_url(1, 4, 4000),
    ]  # fmt: skip


def test_malformed_requests_get_4xx_and_the_server_continues(hf_server: Any) -> None:
    url, client, _, root = hf_server
    with http.unreached_urls() as remote:
        for bad in [*remote, *bad_media(root)]:
            with pytest.raises(openai.APIStatusError) as error:
                ask(client, bad)
            assert 400 <= error.value.status_code < 500, bad
            assert "passwd" not in str(error.value) and "secret" not in str(error.value)
    image = http.image_url(1)
    for options in (
        {"ratio": 2},
        {"ratio": "x"},
        {"ratio": {"audio": 0.5}},
        {"ratio": 0.5, "reducer": "kcentre", "options": {"thumb": 1}},
        {"reducer": "none"},
        {"rate": 0.5},
        {"ratio": 0.99},
        {"tower_ratio": 0.9},
        {"tower_reducer": "none"},
        {"tower_reducer": "fastv"},
    ):
        with pytest.raises(openai.BadRequestError):
            ask(client, image, tokencomp=options)
    for more in ({"n": 17}, {"top_logprobs": 3}, {"max_tokens": 0}, {"stop": 3}, {"n": 0}):
        with pytest.raises(openai.BadRequestError):
            ask(client, image, **more)
    chat = {"model": "tiny", "messages": http.messages(QUESTION, image), "max_tokens": 2}
    for name, value in (
        ("top_k", -2), ("frequency_penalty", 2.5), ("presence_penalty", -3), ("min_p", 2),
        ("logit_bias", {"5": 1}), ("min_tokens", 3), ("tool_choice", "required"),
        ("mm_processor_kwargs", {"max_pixels": 10**9}), ("anything", "else"),
    ):  # fmt: skip
        with pytest.raises(openai.BadRequestError, match=name):
            client.chat.completions.create(**chat, extra_body={name: value})
    client.chat.completions.create(**chat, frequency_penalty=0, user="me", tool_choice="none")
    for weights in ("/etc/passwd", "/etc/none"):
        with pytest.raises(openai.BadRequestError) as error:
            options = {"reducer": "selector", "options": {"weights": weights}}
            ask(client, image, tokencomp=options)
        assert "/etc" not in str(error.value)
    for part, reason in (
        ({"type": "image_url", "image_url": image}, 'expected an object {"url": ...}'),
        ({"type": "input_image", "image_url": {"url": image}}, "content.0.type"),
        ({"type": "text", "text": 3}, "content.0.text"),
    ):
        body = {"model": "tiny", "messages": [{"role": "user", "content": [part]}]}
        status, text = http.get(url + "/v1/chat/completions", body)
        assert status == 400 and reason in json.loads(text)["error"]["message"], text
    off: Any = {"n": None, "stream": None, "response_format": {"type": "text"}}
    off |= {"modalities": ["text"], "temperature": 1e-40}
    turns = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": "Hello."},
        {"role": "assistant", "content": None},
        *chat["messages"],
    ]
    assert client.chat.completions.create(**{**chat, "messages": turns}, **off).choices
    with pytest.raises(openai.BadRequestError, match="no trained weights"):
        ask(client, image, tokencomp={"reducer": "selector"})
    with pytest.raises(openai.BadRequestError, match="tokens before compression"):
        ask(client, image, text="What " * 1200)
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="other", messages=http.messages("x"))
    assert ask(client, image).choices[0].message.content
    assert http.get(url + "/health")[0] == 200
    assert http.metric(url, "tokencomp_requests_total") > 20
