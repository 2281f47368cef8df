"""`tokencomp serve --engine hf` as a real process, with a real `openai` client."""

from __future__ import annotations

import concurrent.futures
import json
import re
import socket
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette")
openai = pytest.importorskip("openai")

from support.console import run  # noqa: E402
from support.matrix import small_weights  # noqa: E402
from support.serving import hf_reference, http  # noqa: E402
from support.serving.http import QUESTION, ask  # noqa: E402

from tokencomp.serving.hf.engine import Engine  # noqa: E402
from tokencomp.serving.hf.metrics import Metrics  # noqa: E402
from tokencomp.serving.spec import ServerOptions  # noqa: E402
from tokencomp.trained.cards import model_card  # noqa: E402


def expected(folder: Any, urls: list[str], spec: dict[str, Any]) -> tuple[str, int, int, float]:
    """Return text, prompt tokens and visual tokens of a direct `generate` on the patched model."""
    ends = hf_reference.end_tokens(folder)
    text, n, stats = hf_reference.chat_answer(folder, urls, QUESTION, spec, ends)
    before, after = stats.tokens_before[0], stats.tokens_after[0]
    return text, n - before + after[0], before, sum(after) / len(after)


IMAGE, WIDE, VIDEO = http.image_url(1), http.image_url(3, 168, 280), http.video_url(2)
ANY = ([IMAGE], [VIDEO], [IMAGE, WIDE], [IMAGE, VIDEO])
TOWER = {"ratio": 0.75, "tower_ratio": 0.5, "tower_reducer": "random"}


@pytest.mark.parametrize(
    ("options", "media"),
    [
        ({"reducer": "uniform", "ratio": 0.3}, ANY),
        ({"reducer": "fastv", "ratio": 0.5}, ANY),
        ({"reducer": "uniform", "budget": 12}, ([IMAGE, WIDE],)),  # tokens of each image
        ({"reducer": "fastv", "budget": 12}, ([IMAGE, WIDE],)),
        ({"reducer": "uniform", "ratio": {"image": 0.25, "video": 0.75}}, ([IMAGE, VIDEO],)),
        ({"reducer": "uniform", **TOWER}, ([IMAGE],)),
        ({"reducer": "uniform", "ratio": 0.75}, ([IMAGE],)),  # after a request with a tower stage
    ],
)
def test_equals_a_direct_call(hf_server: Any, options: dict[str, Any], media: Any) -> None:
    _, client, folder, _ = hf_server
    for urls in media:
        answer = ask(client, *urls, tokencomp=options)
        text, prompt, before, after = expected(folder, urls, options)
        assert answer.choices[0].message.content == text
        assert answer.usage.prompt_tokens == prompt
        usage = answer.usage.model_extra["tokencomp"]
        assert usage["visual_tokens_before"] == before
        assert usage["visual_tokens_after"] == pytest.approx(after)
        assert usage["ratio"] == pytest.approx(1 - after / before)
        assert "budget" not in options or before > 24 >= after


def test_low_detail_equals_a_direct_call(hf_server: Any) -> None:
    _, client, folder, _ = hf_server
    messages = http.messages(QUESTION, IMAGE)
    messages[0]["content"][0]["image_url"]["detail"] = "low"
    body = {"model": "tiny", "messages": messages, "max_tokens": 8, "temperature": 0}
    answer = client.chat.completions.create(**body)
    spec = {"ratio": 0.75, "reducer": "kcenter", "merge": "auto"}
    text, prompt, *_ = expected(folder, [IMAGE], spec)
    assert (answer.choices[0].message.content, answer.usage.prompt_tokens) == (text, prompt)


@pytest.mark.parametrize(
    ("default", "request_options", "tower", "merge"),
    [
        ({"ratio": 0.75, "tower_ratio": 0.5}, None, 0.5, "auto"),
        ({"ratio": 0.75, "tower_ratio": 0.5}, {"tower_ratio": 0.25}, 0.75, "auto"),
        (
            {"ratio": 0.75, "tower_ratio": 0.5},
            {"ratio": 0.4},
            0.6,
            None,
        ),  # all of it in the tower
        ({"ratio": 0.75, "tower_ratio": 0.5}, {"tower_ratio": 0}, 1, "auto"),
        ({"ratio": 0.5}, {"merge": True}, 1, True),
        ({"ratio": 0.5}, {"merge": False}, 1, False),
        ({"ratio": 0.5}, {"reducer": "uniform"}, 1, False),  # only the default merges by itself
        ({"ratio": 0.5}, {"reducer": "bipartite"}, 1, False),
    ],
)
def test_a_request_changes_the_default(
    tiny_folder: Any, default: Any, request_options: Any, tower: float, merge: Any
) -> None:
    """Whatever the request before it set."""
    options = ServerOptions.parse(default, engine="hf")
    engine = Engine(*hf_reference.load(tiny_folder("qwen2_vl")), options, Metrics())
    try:
        for before in ({"merge": True, "tower_ratio": 0.1, "ratio": 0.2}, {"reducer": "uniform"}):
            for request in (before, request_options):
                with engine._compressed(options.resolve(request, engine="hf")):
                    plan = engine._handle.plan
            assert (plan.tower.fraction if plan.tower else 1) == pytest.approx(tower)
            assert [stage.merge for stage in plan.stages] == ([] if merge is None else [merge])
    finally:
        engine.close()


@pytest.mark.long
def test_a_trained_selector_of_features_is_the_default(tiny_folder: Any, tmp_path: Path) -> None:
    """The operator names its weights; what it answers is what the patched model answers."""
    folder = tiny_folder("qwen2_vl")
    card = model_card(hf_reference.load(folder)[0])
    weights = small_weights("selector", card["hidden_size"], card, "features")
    options = {"weights": weights, "input": "features"}
    arguments = ["--model", folder, "--ratio", 0.5, "--reducer", "selector"]
    arguments += [word for k, v in options.items() for word in ("--set", f"{k}={v}")]
    urls = [http.image_url(1), http.video_url(2)]
    with http.server(tmp_path / "log", *arguments, OMP_NUM_THREADS="1") as url:
        client = openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0, timeout=60)
        body = {"model": client.models.list().data[0].id, "max_tokens": 8, "temperature": 0}
        answer = client.chat.completions.create(**body, messages=http.messages(QUESTION, *urls))
    spec = {"reducer": "selector", "ratio": 0.5, **options}
    text, prompt, before, after = expected(folder, urls, spec)
    assert (answer.choices[0].message.content, answer.usage.prompt_tokens) == (text, prompt)
    assert 0 < after < before


def test_server_default_and_ratio_zero(hf_server: Any) -> None:
    _, client, folder, _ = hf_server
    url = http.image_url(1)
    default, off = ask(client, url), ask(client, url, tokencomp={"ratio": 0})
    spec = {"reducer": "kcenter", "ratio": 0.5, "merge": "auto"}
    text, prompt, before, _ = expected(folder, [url], spec)
    assert (default.choices[0].message.content, default.usage.prompt_tokens) == (text, prompt)
    assert off.usage.prompt_tokens == prompt + before // 2
    assert off.usage.model_extra["tokencomp"]["ratio"] == 0


def test_streaming_gives_the_same_text_and_usage(hf_server: Any) -> None:
    _, client, _, _ = hf_server
    url = http.video_url(2)
    whole = ask(client, url)
    stream = ask(client, url, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"


def test_concurrent_requests_are_batched_and_none_is_lost(hf_server: Any) -> None:
    url, client, _, _ = hf_server
    urls = [http.image_url(seed, 112 + 28 * (seed % 4), 168) for seed in range(8)]
    specs = [{"reducer": "uniform", "ratio": ratio} for ratio in (0.5, 0.75)]
    jobs = [(urls[i % 8], specs[i // 8 % 2]) for i in range(64)]
    alone = {(u, str(s)): ask(client, u, tokencomp=s) for u in urls for s in specs}
    count = http.metric(url, "tokencomp_batch_size_count")
    with concurrent.futures.ThreadPoolExecutor(64) as pool:
        answers = list(pool.map(lambda job: ask(client, job[0], tokencomp=job[1]), jobs))
    for (u, s), answer in zip(jobs, answers, strict=True):
        one = alone[u, str(s)]
        assert answer.choices[0].message.content == one.choices[0].message.content
        assert answer.usage == one.usage
    assert http.metric(url, "tokencomp_batch_size_count") - count <= 32  # at least 2 per batch


def test_a_seed_repeats_the_answer_in_any_batch(hf_server: Any) -> None:
    _, client, _, _ = hf_server
    media = http.video_url(4)

    def sampled(seed: int) -> str:
        body = {"model": "tiny", "messages": http.messages(QUESTION, media), "max_tokens": 12}
        answer = client.chat.completions.create(**body, temperature=1.5, seed=seed)
        return answer.choices[0].message.content

    alone = [sampled(seed) for seed in range(4)]
    assert len(set(alone)) > 1
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        together = list(pool.map(sampled, [i % 4 for i in range(16)]))
    assert together == alone * 4


def test_stop_texts_end_the_answer_before_them(hf_server: Any) -> None:
    _, client, _, _ = hf_server
    url = http.image_url(1)
    text = ask(client, url).choices[0].message.content
    stop = text[len(text) // 2 :][:3]
    cut = ask(client, url, stop=[stop])
    assert cut.choices[0].message.content == text[: text.index(stop)]
    assert cut.choices[0].finish_reason == "stop"
    stream = ask(client, url, stop=[stop], stream=True)
    assert "".join(c.choices[0].delta.content or "" for c in stream) == text[: text.index(stop)]


def test_an_abandoned_stream_frees_the_server(hf_server: Any) -> None:
    url, client, _, _ = hf_server
    before = http.metric(url, "tokencomp_generated_tokens_total")
    stream = ask(client, http.image_url(1), stream=True, max_tokens=800)
    next(iter(stream))
    stream.close()
    assert ask(client, http.image_url(2)).choices[0].message.content
    generated = http.metric(url, "tokencomp_generated_tokens_total") - before
    assert generated < 700


def test_metrics_count_tokens(hf_server: Any) -> None:
    url, client, folder, _ = hf_server
    names = [f"tokencomp_visual_tokens_{n}_total" for n in ("before", "after")]
    start = [http.metric(url, n) for n in names]
    others = ["prompt_tokens_total", "end_to_end_seconds_count"]
    others += ["end_to_end_seconds_sum", "time_per_output_token_seconds_count"]
    others += ["time_per_output_token_seconds_sum", "time_to_first_token_seconds_sum"]
    past = [http.metric(url, f"tokencomp_{n}") for n in others]
    media = http.image_url(5)
    since = time.monotonic()
    answer = ask(client, media, tokencomp={"ratio": 0.75})
    seconds = time.monotonic() - since
    new = [http.metric(url, f"tokencomp_{n}") - p for n, p in zip(others, past, strict=True)]
    assert [new[0], new[1], new[3]] == [answer.usage.prompt_tokens, 1, 1]
    assert 0 < new[5] < new[2] < seconds  # the first token, the end of the answer, its arrival
    assert new[2] - new[5] == pytest.approx(new[4] * (answer.usage.completion_tokens - 1))
    assert http.metric(url, "tokencomp_requests_running") == 0
    _, _, before, after = expected(folder, [media], {"reducer": "kcenter", "ratio": 0.75})
    increase = [http.metric(url, n) - s for n, s in zip(names, start, strict=True)]
    assert increase == [before, after]
    assert http.metric(url, "tokencomp_reduce_seconds_total") > 0
    assert http.metric(url, "tokencomp_time_to_first_token_seconds_count") > 0
    assert http.get(url + "/health")[0] == 200
    assert client.models.list().data[0].id == client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_the_log_says_what_is_served_and_what_each_request_cost(hf_server: Any) -> None:
    _, client, _, root = hf_server
    answer = ask(
        client, http.image_url(6), tokencomp={"ratio": 0.75, "reducer": "bipartite"},
        extra_headers={"X-Request-Id": "line-of-the-log"},
    )  # fmt: skip
    assert answer.id == "chatcmpl-line-of-the-log"
    end = time.monotonic() + 30
    while "line-of-the-log" not in (text := (root / "log").read_text()):
        assert time.monotonic() < end
        time.sleep(0.05)
    (line,) = (line for line in text.splitlines() if "line-of-the-log" in line)
    assert re.search(r"POST /v1/chat/completions 200 \d+\.\d{3}s id=line-of-the-log ", line)
    words = f"reducer=bipartite ratio=0.75 prompt={answer.usage.prompt_tokens} visual=64->16"
    assert line.endswith(f"{words} generated={answer.usage.completion_tokens}")
    for part in (
        "serving 'tiny' (Qwen2VLForConditionalGeneration) on cpu in float32",
        "reducer kcenter, ratio 0.5, ratio of requests up to 0.95",
        "limits: 1024 tokens, 8 requests per batch, 256 waiting",
        f"files {root / 'media'}",
        "API key off; host names localhost; shutdown within 60 s",
    ):
        assert part in text, part


def test_the_documentation_names_all_metrics(hf_server: Any) -> None:
    kinds = re.findall(r"^# TYPE (\S+)", http.get(hf_server[0] + "/metrics")[1], re.MULTILINE)
    page = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
    named = re.findall(r"^\| `(tokencomp_\w+)", page, re.MULTILINE)
    assert sorted(named) == sorted(name for name in kinds if not name.endswith("_created"))


def test_real_video_files_and_allowed_paths(hf_server: Any) -> None:
    pytest.importorskip("av")
    import base64

    _, client, _, root = hf_server
    url = http.mp4_url(3)
    sent = ask(client, url)
    file = root / "media" / "a clip.mp4"
    file.write_bytes(base64.b64decode(url.partition(",")[2]))
    parts = [{"type": "video_url", "video_url": {"url": file.as_uri()}}]
    parts.append({"type": "text", "text": QUESTION})
    chat = [{"role": "user", "content": parts}]
    read = client.chat.completions.create(model="tiny", messages=chat, max_tokens=8, temperature=0)
    assert read.choices[0].message.content == sent.choices[0].message.content
    assert read.usage == sent.usage


def test_the_example_client(hf_server: Any, tmp_path: Any) -> None:
    import subprocess
    import sys

    url, _, _, _ = hf_server
    file = tmp_path / "image.png"
    http.tiny.image(1).save(file)
    script = Path(__file__).parents[2] / "examples" / "serve_client.py"
    command = [sys.executable, script, file, QUESTION, "--url", url + "/v1"]
    process = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert process.returncode == 0, process.stderr
    counts = [int(line.split(":")[1].split()[0]) for line in process.stdout.splitlines()]
    full, half, quarter = counts
    assert (full - half, full - quarter) == (32, 48)  # of 64 visual tokens


def test_the_clients_of_the_documentation(hf_server: Any, tmp_path: Any) -> None:
    import subprocess
    import sys

    url, _, _, _ = hf_server
    http.tiny.image(1).save(tmp_path / "image.png")
    page = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
    page = page.replace("http://127.0.0.1:8000", url)
    script = re.search(r"```python\n(.*?)```", page, re.DOTALL)[1]
    command = re.search(r"```bash\n(curl .*?)```", page, re.DOTALL)[1]
    for arguments in ([sys.executable, "-c", script], ["bash", "-c", command]):
        answer = subprocess.run(
            arguments, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=True
        )
        assert re.search("visual_tokens_after.: 16", answer.stdout.replace(":16", ": 16"))


# -- refusals -------------------------------------------------------------------------------------


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
        {"ratio": 0.5, "reducer": "kcenter", "options": {"pool": 1}},
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
