"""`tokencomp serve --engine vllm` as real processes, with a real `openai` client."""

from __future__ import annotations

import base64
import concurrent.futures
import io
import os
import signal
import socket
import struct
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vllm is not installed")

import openai
from PIL import Image
from support.serving import hf_reference, http
from support.serving.selectors import selector
from support.serving.vllm_environment import ENV

from tokencomp.trained.cards import model_card

QUESTION = "What color is the circle?"
ENGINE = ["--enforce-eager", "--dtype", "float32", "--max-model-len", 8192, "--block-size", 32]
ENGINE += ["--max-num-seqs", 16]


@pytest.fixture(scope="module")
def started(tiny_folder: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder, root = tiny_folder("qwen2_vl"), tmp_path_factory.mktemp("vllm")
    (root / "media").mkdir()
    arguments = ["--engine", "vllm", "--model", folder, "--ratio", 0.5, "--low-detail-ratio", 0.9]
    arguments += ["--served-model-name", "tiny", "--allowed-media-path", root / "media"]
    arguments += ["--", *ENGINE]
    with http.process(root / "log", *arguments, **ENV, TOKENCOMP_API_KEY="secret") as (
        url,
        process,
    ):
        yield url, process, folder, root


@pytest.fixture(scope="module")
def served(started: Any) -> Any:
    url, _, folder, root = started
    client = openai.OpenAI(base_url=url + "/v1", api_key="secret", max_retries=0, timeout=120)
    return url, client, folder, root


def ask(client: Any, *urls: str, text: str = QUESTION, **more: Any) -> Any:
    options = more.pop("tokencomp", None)
    body: dict[str, Any] = {"ignore_eos": True}
    if options is not None:
        body["mm_processor_kwargs"] = {"tokencomp": options}
    return client.chat.completions.create(
        model="tiny", messages=http.messages(text, *urls), max_tokens=more.pop("max_tokens", 8),
        temperature=0, extra_body=body, **more,
    )  # fmt: skip


def expected(folder: Any, urls: list[str], spec: dict[str, Any]) -> tuple[str, int, int]:
    """Return text, prompt tokens and removed visual tokens of the patched Hugging Face model."""
    text, n, stats = hf_reference.chat_answer(folder, urls, QUESTION, spec)
    removed = stats.tokens_before[0] - stats.tokens_after[0][0]
    return text.rstrip("\ufffd"), n - removed, removed  # an incomplete character is not sent


def test_the_server_says_what_it_serves(served: Any) -> None:
    url, client, _, _ = served
    page = client.with_options(base_url=url).get("/", cast_to=str)
    assert "serves tiny with" in page and '"ratio": 0.5' in page
    assert f"curl {url}/v1/chat/completions" in page and "TOKENCOMP_API_KEY" in page
    assert http.get(url + "/")[0] == 401
    card, listed = client.models.retrieve("tiny"), next(iter(client.models.list()))
    assert (card.id, card.max_model_len) == (listed.id, listed.max_model_len) == ("tiny", 8192)
    with pytest.raises(openai.NotFoundError, match="model 'other': this server has tiny"):
        client.models.retrieve("other")
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.retrieve("tiny")


@pytest.mark.parametrize("reducer", ["divprune", "bipartite"])
def test_equals_the_patched_model_over_http(served: Any, reducer: str) -> None:
    _, client, folder, _ = served
    spec = {"reducer": reducer, "ratio": 0.6}
    image, video = http.image_url(1), http.video_url(2)
    wide, file = http.image_url(3, 168, 280), http.mp4_url(4)
    for urls in ([image], [video], [file], [image, wide], [image, video]):
        answer, plain = (
            ask(client, *urls, tokencomp=spec),
            ask(client, *urls, tokencomp={"ratio": 0}),
        )
        text, prompt, removed = expected(folder, urls, spec)
        assert answer.choices[0].message.content == text
        assert answer.usage.prompt_tokens == prompt
        assert plain.usage.prompt_tokens - prompt == removed > 0


def test_long_video_files_have_as_many_tokens_as_on_transformers(served: Any) -> None:
    """The texts differ: transformers 5 gives what follows a long video other positions."""
    _, client, folder, _ = served
    spec, url = {"reducer": "uniform", "ratio": 0.6}, http.mp4_url(5, frames=50)
    answer = ask(client, url, tokencomp=spec)
    assert answer.usage.prompt_tokens == expected(folder, [url], spec)[1]


def test_server_default(served: Any) -> None:
    _, client, folder, _ = served
    url = http.image_url(1)
    text, prompt, _ = expected(folder, [url], {"reducer": "kcenter", "ratio": 0.5})
    answer = ask(client, url)
    assert (answer.choices[0].message.content, answer.usage.prompt_tokens) == (text, prompt)


def test_a_trained_selector_of_features_is_the_default(tiny_folder: Any, tmp_path: Path) -> None:
    """The operator names its weights; images and clips keep what they keep in the patched model."""
    folder = tiny_folder("qwen2_vl")
    options = selector(tmp_path, model_card(hf_reference.load(folder)[0]))
    arguments = ["--engine", "vllm", "--model", folder, "--ratio", 0.5, "--reducer", "selector"]
    arguments += [word for k, v in options.items() for word in ("--set", f"{k}={v}")]
    arguments += ["--served-model-name", "tiny", "--", *ENGINE]
    image, video = http.image_url(1), http.video_url(2)
    with http.server(tmp_path / "log", *arguments, **ENV) as url:
        client = openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0, timeout=120)
        for urls in ([image], [video], [image, video]):
            answer = ask(client, *urls)
            spec = {"reducer": "selector", "ratio": 0.5, **options}
            text, prompt, removed = expected(folder, urls, spec)
            assert answer.choices[0].message.content == text
            assert answer.usage.prompt_tokens == prompt and removed > 0
            other = ask(client, *urls, tokencomp={"options": {"pick": "mmr"}, "ratio": 0.75})
            text, prompt, _ = expected(folder, urls, {**spec, "pick": "mmr", "ratio": 0.75})
            assert other.choices[0].message.content == text
            assert other.usage.prompt_tokens == prompt


def test_images_and_videos_have_ratios_of_their_own(served: Any) -> None:
    _, client, folder, _ = served
    image, video = http.image_url(1), http.video_url(2)
    spec = {"reducer": "divprune", "ratio": {"image": 0.75, "video": 0.5}}
    answer = ask(client, image, video, tokencomp=spec)
    text, prompt, _ = expected(folder, [image, video], spec)
    assert (answer.choices[0].message.content, answer.usage.prompt_tokens) == (text, prompt)
    part = {"type": "image_url", "image_url": {"url": image, "detail": "low"}}
    message = {"role": "user", "content": [part, {"type": "text", "text": QUESTION}]}
    answer = client.chat.completions.create(
        model="tiny", messages=[message], max_tokens=8, temperature=0,
        extra_body={"ignore_eos": True},
    )  # fmt: skip
    text, prompt, _ = expected(folder, [image], {"reducer": "kcenter", "ratio": 0.9})
    assert (answer.choices[0].message.content, answer.usage.prompt_tokens) == (text, prompt)


LONG = 64  # tokens of an answer, so that requests overlap while they decode


def streamed(client: Any, *urls: str, stop_after: int = 0, **more: Any) -> str:
    """Return the text of a stream, whose client hangs up after `stop_after` parts, if not 0."""
    stream, parts = ask(client, *urls, stream=True, max_tokens=LONG, **more), []
    for chunk in stream:
        parts.append(chunk.choices[0].delta.content or "" if chunk.choices else "")
        if len(parts) == stop_after:
            stream.close()
            break
    return "".join(parts)


def test_64_concurrent_mixed_requests_and_none_is_lost(served: Any) -> None:
    """Images, several media, a video and text; streams, and clients that hang up."""
    url, client, _, _ = served
    images = [http.image_url(seed, 112 + 28 * (seed % 4), 168) for seed in range(5)]
    media = [[image] for image in images] + [images[:2], [http.video_url(1)], []]
    specs = [{"reducer": "uniform", "ratio": 0.5}, {"reducer": "divprune", "ratio": 0.75}]
    specs += [{"ratio": 0}]
    kinds = [(m, s) for m in media for s in specs]
    alone = [ask(client, *m, tokencomp=s, max_tokens=LONG) for m, s in kinds]

    def answer(i: int) -> tuple[int, str]:
        m, s = kinds[i % len(kinds)]
        if i % 8 == 5:
            streamed(client, *m, tokencomp=s, stop_after=3 + i % 7)
            return i, ""
        if i % 2:
            return i, streamed(client, *m, tokencomp=s)
        result = ask(client, *m, tokencomp=s, max_tokens=LONG)
        assert result.usage.completion_tokens == LONG
        assert result.usage.prompt_tokens == alone[i % len(kinds)].usage.prompt_tokens
        return i, result.choices[0].message.content

    with concurrent.futures.ThreadPoolExecutor(64) as pool:
        answers = list(pool.map(answer, range(64)))
    assert [i for i, _ in answers] == list(range(64))
    for i, text in answers:
        if i % 8 != 5:
            assert text == alone[i % len(kinds)].choices[0].message.content, i
    end = time.monotonic() + 30
    while http.metric(url, "vllm:num_requests_running") and time.monotonic() < end:
        time.sleep(0.1)
    assert http.metric(url, "vllm:num_requests_running") == 0


def test_an_abandoned_stream_is_aborted(served: Any) -> None:
    url, client, _, _ = served
    before = http.metric(url, "vllm:generation_tokens_total")
    stream = ask(client, http.image_url(1), stream=True, max_tokens=7000)
    next(iter(stream))
    stream.close()
    assert ask(client, http.image_url(2)).choices[0].message.content
    end = time.monotonic() + 30
    while http.metric(url, "vllm:num_requests_running") and time.monotonic() < end:
        time.sleep(0.1)
    assert http.metric(url, "vllm:num_requests_running") == 0
    assert http.metric(url, "vllm:generation_tokens_total") - before < 6000


def test_metrics_count_tokens(served: Any) -> None:
    url, client, _, _ = served
    names = [f"tokencomp_visual_tokens_{n}_total" for n in ("before", "after")]
    media = http.image_url(5)
    for _ in range(2):  # in the second request the media come from the cache
        start = [http.metric(url, n) for n in names]
        ask(client, media, tokencomp={"ratio": 0.75})
        increase = [http.metric(url, n) - s for n, s in zip(names, start, strict=True)]
        assert increase == [64, 16]
    assert http.metric(url, "tokencomp_achieved_ratio") == 0.75
    assert http.metric(url, "tokencomp_reduce_seconds_total") > 0


def bombs() -> list[str]:
    """Return a picture and an animation of a few bytes, which take gigabytes when decoded."""
    out = io.BytesIO()
    Image.new("L", (20_000, 20_000)).save(out, "PNG")
    frame = b"," + struct.pack("<4H", 0, 0, 1, 1) + b"\0\2\2D\1\0"
    head = b"GIF89a" + struct.pack("<2H", 2500, 2500) + b"\x80\0\0" + bytes(6)
    files = (("image/png", out.getvalue()), ("video/gif", head + 4000 * frame + b";"))
    return [f"data:{kind};base64,{base64.b64encode(data).decode()}" for kind, data in files]


def test_malformed_requests_get_4xx_and_the_server_continues(served: Any) -> None:
    url, client, _, root = served
    good = http.image_url(1)
    os.mkfifo(root / "media" / "pipe")
    cut = base64.b64decode(http.mp4_url(1).partition(",")[2])[:-100]
    media = [
        *http.outside(root / "media", root / "secret.png"), "data:image/png;base64,aGVsbG8=",
        good[: len(good) // 2], "data:video/mp4;base64,aGVsbG8=", f"file://{root}/media/none.png",
        f"file://{root}/media/{'x' * 300}.png", f"file://{root}/media/pipe",
        good.replace("data:image/png", "data:video/mp4"),
        "data:video/mp4;base64," + base64.b64encode(cut).decode(), *bombs(),
    ]  # fmt: skip
    with http.unreached_urls() as remote:
        for bad in [*remote, *media]:
            with pytest.raises(openai.APIStatusError) as error:
                ask(client, bad)
            assert 400 <= error.value.status_code < 500, (bad, error.value)
    wrong = [{"ratio": 2}, {"ratio": "x"}, {"reducer": "none"}, {"reducer": "fastv"}, {"rate": 1}]
    wrong += [{"tower_ratio": 0.4, "tower_reducer": name} for name in ("oracle", "adsc")]
    wrong += [{"ratio": 0.5, "options": text} for text in ("[" * 10**5, "1" * 5000)]
    for options in wrong:
        with pytest.raises(openai.BadRequestError, match=r"ratio|reducer|Allowed|options are not"):
            ask(client, good, tokencomp=options)
    with pytest.raises(openai.BadRequestError):
        ask(client, good, text="What " * 9000)
    larger = {"mm_processor_kwargs": {"max_pixels": 10**9}}
    slower = {"media_io_kwargs": {"video": {"num_frames": -1}}}
    for body, reason in (
        (larger, "takes only 'tokencomp'"),
        (slower, "open to requests for the frames"),
    ):
        with pytest.raises(openai.BadRequestError, match=reason):
            client.chat.completions.create(
                model="tiny", messages=http.messages(QUESTION, good), extra_body=body
            )
    assert ask(client, good).choices[0].message.content
    assert http.get(url + "/health")[0] == 200


def test_bodies_without_a_key_are_refused_unread(served: Any) -> None:
    """This server has a key. The answer comes although half of the body never does."""
    url = served[0]
    port = int(url.rpartition(":")[2])
    line = b"POST /v1/chat/completions HTTP/1.1\r\n"
    head = line + b"Host: localhost\r\nContent-Type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.sendall(head + b"Content-Length: 60000000\r\n\r\n" + b'{"a": [')
        assert connection.recv(100).startswith(b"HTTP/1.1 401")


def test_running_requests_end_after_sigterm(served: Any, started: Any) -> None:
    """The last test of this module, as it ends the server."""
    (url, client, _, _), process = served, started[1]

    def begun() -> float:
        names = ("vllm:num_requests_running", "vllm:request_success_total")
        return sum(http.metric(url, name) for name in names)

    before, deadline = begun(), time.monotonic() + 300
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        plain = [pool.submit(ask, client, http.image_url(i), max_tokens=400) for i in range(3)]
        streams = [
            pool.submit(
                lambda i=i: list(ask(client, http.image_url(i), max_tokens=400, stream=True))
            )
            for i in range(3)
        ]
        while begun() < before + 6:  # some may have ended before the last is accepted
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGTERM)
        while http.get(url + "/health")[0] == 200:
            assert time.monotonic() < deadline
        assert not all(answer.done() for answer in (*plain, *streams))
        with pytest.raises(openai.APIStatusError) as error:
            ask(client, http.image_url(9))
        head = error.value.response.headers
        assert error.value.status_code == http.get(url + "/health")[0] == 503
        assert head["connection"] == "close" and int(head["retry-after"]) > 0
        for answer in plain:
            assert answer.result().usage.completion_tokens == 400
        for answer in streams:
            assert answer.result()[-1].choices[0].finish_reason == "length"
    assert process.wait(timeout=60) is not None
