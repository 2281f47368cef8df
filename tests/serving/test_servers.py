"""`tokencomp serve` as a real process on both engines, with a real `openai` client."""

from __future__ import annotations

import concurrent.futures
import io
import json
import os
import re
import shlex
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("starlette")
pytest.importorskip("av")
openai = pytest.importorskip("openai")

import numpy as np  # noqa: E402
from PIL import Image  # noqa: E402
from prometheus_client.parser import text_string_to_metric_families  # noqa: E402
from support.console import run  # noqa: E402
from support.serving import hf_reference, http  # noqa: E402
from support.serving.files import canvas, content, data, png  # noqa: E402
from support.serving.processes import Served, started  # noqa: E402
from support.serving.selectors import selector  # noqa: E402

import tokencomp  # noqa: E402
from tokencomp.inputs.prompts import chat_inputs  # noqa: E402
from tokencomp.trained.cards import model_card  # noqa: E402

ROOT = Path(__file__).parents[2]
CROWD = 70  # requests at once, of 64 visual tokens, which one test alone sends
IMAGE, WIDE, VIDEO = http.image_url(1), http.image_url(3, 168, 280), http.video_url(2)


@pytest.fixture(scope="module", params=["hf", "vllm"])
def served(
    request: pytest.FixtureRequest, tiny_folder: Any, tmp_path_factory: Any
) -> Iterator[Served]:
    """A server with a media path and all ratios; that on vLLM has a key and a further path."""
    root = tmp_path_factory.mktemp(request.param)
    (root / "media").mkdir()
    arguments = ["--ratio", 0.5, "--low-detail-ratio", 0.9, "--ratio-by-load", f"0.75:{60 * CROWD}"]
    if request.param == "vllm":
        arguments += ["--allow-path", "/v1/completions"]
    arguments += ["--allowed-media-path", root / "media"]
    with started(request.param, tiny_folder("qwen2_vl"), root, *arguments) as server:
        yield server


def expected(served: Served, urls: list[str], spec: Any) -> tuple[str, int, Any]:
    """Return text, prompt tokens and statistics of a direct call of the patched model."""
    text, n, stats = hf_reference.chat_answer(served.folder, urls, http.QUESTION, spec)
    removed = stats.tokens_before[0] - stats.tokens_after[0][0]
    return text.rstrip("\ufffd"), n - removed, stats  # vLLM sends no incomplete character


def check(answer: Any, want: tuple[str, int, Any]) -> None:
    text = answer.choices[0].message.content.rstrip("\ufffd")
    assert (text, answer.usage.prompt_tokens) == want[:2]


DEFAULT = {"ratio": 0.5, "reducer": "auto", "merge": "auto"}
EVERY = ([IMAGE], [VIDEO], [http.mp4_url(4)], [IMAGE, WIDE], [IMAGE, VIDEO])
CASES: dict[str, tuple[Any, Any]] = {  # options of requests, and their media
    "uniform": ({"reducer": "uniform", "ratio": 0.3}, EVERY),
    "divprune": ({"reducer": "divprune", "ratio": 0.6}, EVERY),
    "bipartite": ({"reducer": "bipartite", "ratio": 0.6}, EVERY),
    "fastv": ({"reducer": "fastv", "ratio": 0.5}, EVERY),
    "budget": ({"reducer": "uniform", "budget": 12}, ([IMAGE, WIDE],)),  # tokens of each image
    "fastv budget": ({"reducer": "fastv", "budget": 12}, ([IMAGE, WIDE],)),
    "by modality": ({"reducer": "divprune", "ratio": {"image": 0.25, "video": 0.75}},
                    ([IMAGE, VIDEO],)),
    "tower": ({"reducer": "uniform", "ratio": 0.75, "tower_ratio": 0.5, "tower_reducer": "random"},
              ([IMAGE],)),
    "after a tower": ({"reducer": "uniform", "ratio": 0.75}, ([IMAGE],)),
    "default": (None, ([IMAGE], [VIDEO])),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_equals_the_patched_model(served: Served, name: str) -> None:
    options, media = CASES[name]
    if served.engine == "vllm" and "fastv" in name:
        pytest.skip("no reducer for vLLM")
    spec = options or (DEFAULT if served.engine == "hf" else {**DEFAULT, "merge": False})
    for urls in media:
        answer, plain = served.ask(*urls, tokencomp=options), served.ask(*urls, ratio=0)
        check(answer, want := expected(served, urls, spec))
        before, after = want[2].tokens_before[0], want[2].tokens_after[0]
        assert plain.usage.prompt_tokens - answer.usage.prompt_tokens == before - after[0]
        assert sum(after) < before * len(after)
        usage = answer.usage.model_extra["tokencomp"]
        assert usage["visual_tokens_before"] == before
        assert usage["visual_tokens_after"] == pytest.approx(sum(after) / len(after))
        assert usage["ratio"] == pytest.approx(1 - sum(after) / len(after) / before)
        assert usage["reducer"] == spec["reducer"]
        amount = {n: v for n, v in (options or {"ratio": 0.5}).items() if n in ("ratio", "budget")}
        assert usage["requested"] == amount
        assert usage["merge"] is (want[2].merged_from is not None)
        off = plain.usage.model_extra["tokencomp"]
        assert (off["ratio"], off["visual_tokens_before"], off["reducer"]) == (0, before, "none")


@pytest.mark.parametrize("engine", ["hf", "vllm"])
def test_an_agent_pays_for_what_changed_on_its_screen(
    engine: str, tiny_folder: Any, tmp_path: Path
) -> None:
    """Twelve steps of one conversation; a model that has seen none of them answers the same."""
    folder, random = tiny_folder("qwen2_vl"), np.random.default_rng(0)
    model, processor = hf_reference.load(folder)
    pixels = random.integers(0, 256, (112, 112, 3), dtype=np.uint8)
    chat, plain, images, tokens = [], [], [], []  # type: ignore[var-annotated]
    with started(engine, folder, tmp_path, "--reducer", "delta") as it:
        for step in range(12):
            if step:  # in one cell of 28 × 28 pixels
                pixels[28 * (step // 4) + 5, 28 * (step % 4) + 9] ^= 1
            images.append(Image.fromarray(pixels))
            images[-1].save(file := io.BytesIO(), "png")
            chat += http.messages("Next?", data(file.getvalue()))
            parts = [{"type": "image"}, {"type": "text", "text": "Next?"}]
            plain.append({"role": "user", "content": parts})
            answer = it.ask(messages=chat)
            inputs = chat_inputs(processor, [plain], images, [])
            n = inputs["input_ids"].shape[1]
            with tokencomp.patch(model, reducer="delta") as handle:
                out = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, n:]
            text = processor.tokenizer.decode(out, skip_special_tokens=True).rstrip("\ufffd")
            check(answer, (text, n - 15 * step, handle.stats))
            said = {"role": "assistant", "content": answer.choices[0].message.content}
            chat, plain = [*chat, said], [*plain, said]
            usage = answer.usage.model_extra["tokencomp"]
            tokens.append(usage["visual_tokens_after"])
    assert tokens == [16 + step for step in range(12)]


def test_low_detail_has_the_ratio_of_the_operator(served: Served) -> None:
    messages = http.messages(http.QUESTION, IMAGE)
    messages[0]["content"][0]["image_url"]["detail"] = "low"
    spec = {**DEFAULT, "ratio": 0.9, "merge": "auto" if served.engine == "hf" else False}
    check(served.ask(messages=messages), expected(served, [IMAGE], spec))


def test_long_video_files_have_as_many_tokens_as_on_transformers(served: Served) -> None:
    """The texts differ: transformers 5 gives what follows a long video other positions."""
    spec, url = {"reducer": "uniform", "ratio": 0.6}, http.mp4_url(5, frames=50)
    answer = served.ask(url, tokencomp=spec)
    assert answer.usage.prompt_tokens == expected(served, [url], spec)[1]


def test_files_below_the_media_path_are_read(served: Served) -> None:
    url, file = http.mp4_url(3), served.root / "media" / "a clip.mp4"
    file.write_bytes(content(url))
    part = {"type": "video_url", "video_url": {"url": file.as_uri()}}
    chat = [{"role": "user", "content": [part, {"type": "text", "text": http.QUESTION}]}]
    sent, read = served.ask(url), served.ask(messages=chat)
    assert read.choices[0].message.content == sent.choices[0].message.content
    assert read.usage == sent.usage


def test_a_trained_selector_of_features_is_the_default(tiny_folder: Any, tmp_path: Path) -> None:
    """The operator names its weights; images and clips keep what they keep in the patched model."""
    pytest.importorskip("vllm")
    folder = tiny_folder("qwen2_vl")
    options = selector(tmp_path, model_card(hf_reference.load(folder)[0]))
    reducer = f"selector({','.join(f'{k}={v}' for k, v in options.items())})"
    with started("vllm", folder, tmp_path, "--ratio", 0.5, "--reducer", reducer) as it:
        for urls in ([IMAGE], [VIDEO], [IMAGE, VIDEO]):
            spec = {"reducer": "selector", "ratio": 0.5, **options}
            check(it.ask(*urls), expected(it, urls, spec))
            other = it.ask(*urls, tokencomp={"options": {"pick": "mmr"}, "ratio": 0.75})
            check(other, expected(it, urls, {**spec, "pick": "mmr", "ratio": 0.75}))


def test_the_server_says_what_it_serves(served: Served) -> None:
    client = served.client
    page = client.with_options(base_url=served.url).get("/", cast_to=str)
    words = shlex.split(page.splitlines()[-1])  # a line that a user can paste
    assert words[1] == f"{served.url}/v1/chat/completions" and '"ratio": 0.5' in page
    assert served.ask(messages=json.loads(words[-1])["messages"])
    card, listed = client.models.retrieve("tiny"), next(iter(client.models.list()))
    assert (card.id, card.max_model_len) == (listed.id, listed.max_model_len) == ("tiny", 8192)
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="other", messages=http.messages("x"))
    assert http.get(served.url + "/version")[0] == (401 if served.key else 200)


# -- many requests --------------------------------------------------------------------------------


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_64_mixed_requests_and_none_is_lost(served: Served) -> None:
    """Each answer is that of the same request alone: whole, or as a stream; some clients hang up.

    They decode at the same time, with penalties and log-probabilities of their own.
    """
    images = [http.image_url(seed, 112 + 28 * (seed % 4), 168) for seed in range(5)]
    media = [[image] for image in images] + [images[:2], [VIDEO], []]
    specs = [{"reducer": "uniform", "ratio": 0.5}, {"ratio": 0}]
    specs += [{"reducer": "fastv" if served.engine == "hf" else "divprune", "ratio": 0.75}]
    kinds = [(m, s, 1 + j / 5) for m in media for j, s in enumerate(specs)]
    count = f"{served.metrics['batches']}_count"

    def ask(i: int, stream: bool = False) -> Any:
        m, s, penalty = kinds[i % len(kinds)]
        more: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}
        return served.ask(
            *m, tokencomp=s, max_tokens=64, repetition_penalty=penalty, logprobs=penalty != 1,
            **more if stream else {},
        )  # fmt: skip

    alone = [ask(i) for i in range(len(kinds))]
    assert {answer.usage.completion_tokens for answer in alone} == {64}
    before = http.metric(served.url, count) if served.engine == "hf" else 0

    def answer(i: int) -> bool:
        want = alone[i % len(kinds)]
        if i % 2 == 0:
            got = ask(i)
            text, usage = got.choices[0].message.content, got.usage
        else:
            stream = ask(i, stream=True)
            if i % 8 == 5:
                for _ in range(3 + i % 7):
                    next(iter(stream))
                stream.close()
                return True
            chunks = list(stream)
            text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
            usage = chunks[-1].usage
            assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
        assert text == want.choices[0].message.content, i
        counts = "prompt_tokens", "completion_tokens"
        assert [getattr(usage, n) for n in counts] == [getattr(want.usage, n) for n in counts], i
        return False

    with concurrent.futures.ThreadPoolExecutor(64) as pool:
        assert sum(pool.map(answer, range(64))) == 8
    wait_for(lambda: served.idle)
    if served.engine == "hf":
        assert http.metric(served.url, count) - before <= 32  # at least 2 per batch


def test_an_abandoned_stream_is_aborted(served: Served) -> None:
    generated = served.metrics["generated"]
    before = http.metric(served.url, generated)
    stream = served.ask(IMAGE, stream=True, max_tokens=7000)
    next(iter(stream))
    stream.close()
    assert served.ask(WIDE).choices[0].message.content
    wait_for(lambda: served.idle)
    assert http.metric(served.url, generated) - before < 6000


def samples(url: str, name: str) -> dict[tuple[str, ...], float]:
    """Return the values of a metric of compression by the values of its labels, in one order."""
    found = {}
    for family in text_string_to_metric_families(http.get(url + "/metrics")[1]):
        for sample in family.samples:
            if sample.name == name:
                found[tuple(sample.labels[label] for label in sorted(sample.labels))] = sample.value
    return found


def test_metrics_count_tokens_by_modality_reducer_and_ratio(served: Served) -> None:
    """An image of 64 tokens, and a clip of 4 × 12; streamed, the usage is in the last chunk."""
    names = [f"tokencomp_visual_tokens_{n}_total" for n in ("before", "after")]
    names += ["tokencomp_achieved_ratio_count", "tokencomp_achieved_ratio_sum"]
    media, clip = http.image_url(5), http.video_url(2)
    image, video = ("image", "0.75", "uniform", "all"), ("video", "0.75", "uniform", "all")
    off, answers = ("image", "0", "none", "all"), []
    for _ in range(2):  # in vLLM's second request the media come from the cache
        start = [samples(served.url, name) for name in names]
        asked = {"reducer": "uniform", "ratio": 0.74}
        more = {"stream": True, "stream_options": {"include_usage": True}}
        *_, last = served.ask(media, clip, tokencomp=asked, **more)
        served.ask(media, ratio=0)
        answers.append(last.usage.model_extra["tokencomp"])
        rise = [
            {
                k: v - old.get(k, 0)
                for k, v in samples(served.url, name).items()
                if v != old.get(k, 0)
            }
            for name, old in zip(names, start, strict=True)
        ]
        assert rise[0] == {image: 64, video: 48, off: 64}
        assert rise[1] == {image: 17, video: 12, off: 64}  # 26 % of 64 and of 48
        short = [(k[0], k[2], k[3]) for k in (image, video, off)]
        assert rise[2] == dict.fromkeys(short, 1)
        assert rise[3] == pytest.approx({short[0]: 1 - 17 / 64, short[1]: 0.75})
    assert answers[0] == answers[1]
    assert (answers[0]["visual_tokens_before"], answers[0]["visual_tokens_after"]) == (112, 29)
    assert http.metric(served.url, "tokencomp_reduce_seconds_total") > 0


def test_the_line_of_the_log_has_the_id_of_the_answer(served: Served) -> None:
    headers = {"X-Request-Id": "a-line"}
    answer = served.ask(IMAGE, extra_headers=headers, ratio=0.75)
    assert answer.id == "chatcmpl-a-line"
    wait_for(lambda: "id=a-line " in (served.root / "log").read_text())
    (line,) = re.findall(".*id=a-line .*", (served.root / "log").read_text())
    assert re.search(r"POST /v1/chat/completions 200 [0-9.]+s id=a-line reducer=auto", line)
    counts = f" prompt={answer.usage.prompt_tokens} generated=8" if served.engine == "hf" else ""
    merge = {"hf": "on", "vllm": "off"}[served.engine]
    assert f"reducer=auto ratio=0.75 merge={merge} visual=64->16{counts}" in line
    raw = served.client.chat.completions.with_raw_response.create(
        model="tiny", messages=http.messages("x"), max_tokens=1
    )
    assert raw.parse().id == f"chatcmpl-{raw.headers['x-request-id']}"


def named(expression: str) -> set[str]:
    """Return the metrics in an expression of PromQL."""
    return set(re.findall(r"\b(?:tokencomp_|vllm:)\w+", expression))


def test_dashboard_and_alerts_name_metrics_that_are_exported(served: Served) -> None:
    """Every panel and every rule has a series on either engine, and labels that exist."""
    folder = ROOT / "examples" / "deploy"
    panels = json.loads((folder / "grafana.json").read_text())["panels"]
    groups = yaml.safe_load((folder / "alerts.yaml").read_text())["groups"]
    rules = [rule["expr"] for group in groups for rule in group["rules"]]
    queries = [[target["expr"] for target in panel["targets"]] for panel in panels]
    served.ask(IMAGE)
    families = text_string_to_metric_families(http.get(served.url + "/metrics")[1])
    labels: dict[str, set[str]] = {}
    for sample in (s for family in families for s in family.samples):
        labels.setdefault(sample.name, set()).update(sample.labels)
    assert len(queries) >= 6 and len(rules) == 8
    for expressions in [*queries, *([rule] for rule in rules)]:
        # `up` is Prometheus's own; the other is only on vLLM, after a first item.
        metrics = set().union(*map(named, expressions)) - {"tokencomp_nonfinite_items_total"}
        assert metrics & labels.keys() or not metrics, expressions
        others = {n for n in metrics - labels.keys() if n.startswith("tokencomp_")}
        assert served.engine == "vllm" or not others, others
        others = {n for n in metrics - labels.keys() if n.startswith("vllm:")}
        assert served.engine == "hf" or not others, others
        for text in expressions:
            known = {"instance"}.union(*(labels[n] for n in named(text) & labels.keys()))
            for names in re.findall(r"by \(([^)]*)\)", text) if named(text) & labels.keys() else ():
                assert set(names.replace(" ", "").split(",")) <= known, text


def test_times_of_an_answer_are_counted(served: Served) -> None:
    if served.engine == "vllm":
        pytest.skip("vLLM's own metrics")
    names = ("time_to_first_token_seconds_sum", "end_to_end_seconds_sum",
             "time_per_output_token_seconds_sum", "end_to_end_seconds_count")  # fmt: skip
    past, since = [http.metric(served.url, f"tokencomp_{n}") for n in names], time.monotonic()
    answer = served.ask(IMAGE, ratio=0.75)
    seconds = time.monotonic() - since
    wait_for(lambda: http.metric(served.url, f"tokencomp_{names[-1]}") > past[-1])
    first, whole, per_token, count = (
        http.metric(served.url, f"tokencomp_{n}") - p for n, p in zip(names, past, strict=True)
    )
    assert count == 1 and 0 < first < whole < seconds
    assert whole - first == pytest.approx(per_token * (answer.usage.completion_tokens - 1))


# -- clients --------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["--reducer", "selector"], ["--port", "PORT"]])
def test_a_server_that_cannot_serve_does_not_start(tiny_folder: Any, arguments: list[str]) -> None:
    """Without trained weights, or where another one listens."""
    with socket.socket() as occupied:
        occupied.bind(("127.0.0.1", 0))
        occupied.listen()
        port = str(occupied.getsockname()[1])
        args = [port if a == "PORT" else a for a in arguments]
        assert run("serve", "--model", tiny_folder("qwen2_vl"), *args) != 0


WRONG: list[dict[str, Any]] = [
    {"ratio": 2}, {"ratio": "x"}, {"ratio": {"film": 0.5}}, {"ratio": 0.99}, {"reducer": "none"},
    {"reducer": "kcenter", "options": {"pool": 1}}, {"rate": 0.5}, {"reducer": "selector"},
    {"reducer": "selector", "options": {"weights": "/etc/passwd"}}, {"budget": {"prompt": 8}},
    {"tower_ratio": 0.9}, {"tower_ratio": 0.4, "tower_reducer": "none"},
    {"tower_ratio": 0.4, "tower_reducer": "fastv"}, {"ratio": 0.5, "options": "[" * 10**5},
    {"ratio": 0.5, "options": "1" * 5000},
]  # fmt: skip
WRONG_ON = {
    "hf": [{"ratio": {"audio": 0.5}}],
    "vllm": [{"reducer": "fastv"}, {"tower_ratio": 0.4, "tower_reducer": "adsc"}],
}


def test_malformed_requests_get_4xx_and_the_server_continues(served: Served) -> None:
    """What a decoder or the engine itself would have to refuse; the rest is in test_doors."""
    clip = content(http.mp4_url(1))
    media = [
        *http.outside(served.root / "media", served.root / "secret.png"), IMAGE[: len(IMAGE) // 2],
        data(clip[:-100], "video/mp4"), data(b"hello", "video/mp4"), data(b"hello", "video/jpeg"),
        IMAGE.replace("data:image/png", "data:video/mp4"), http.image_url(1, 4, 4000),
        data(b'#EXTM3U\n#EXT-X-MEDIA:URI="file:///etc/passwd"\n', "video/mp4"),
        png(20_000), canvas(2500, 4000),
    ]  # fmt: skip
    with http.unreached_urls() as remote:
        for bad in [*remote, *media]:
            with pytest.raises(openai.APIStatusError) as error:
                served.ask(bad)
            assert 400 <= error.value.status_code < 500, (bad[:100], error.value)
            assert "passwd" not in str(error.value) and "secret" not in str(error.value)
    for options in WRONG + WRONG_ON[served.engine]:
        with pytest.raises(openai.BadRequestError) as error:
            served.ask(IMAGE, tokencomp=options)
        assert "/etc" not in str(error.value)
    bodies: list[dict[str, Any]] = [{"mm_processor_kwargs": {"max_pixels": 10**9}}, {"n": 0}]
    bodies += [{"text": "What " * 9000}, {"max_tokens": 0}, {"top_logprobs": 3, "logprobs": False}]
    for more in bodies:
        with pytest.raises(openai.BadRequestError):
            served.ask(IMAGE, **more)
    # vLLM answers once with 500 to media of which a refused request has filled one cache alone.
    assert served.ask(http.image_url(77)).choices[0].message.content
    assert http.get(served.url + "/health")[0] == 200


def test_a_client_may_leave_in_the_middle_of_a_body(served: Served) -> None:
    """Where it has no key, the answer comes although half of the body never does."""
    address = "127.0.0.1", int(served.url.rpartition(":")[2])
    line = b"POST /v1/chat/completions HTTP/1.1\r\n"
    head = line + b"Host: localhost\r\nContent-Type: application/json\r\n"
    with socket.create_connection(address, timeout=20) as connection:
        connection.sendall(head + b"Content-Length: 60000000\r\n\r\n" + b'{"a": [')
        if served.key:
            assert connection.recv(100).startswith(b"HTTP/1.1 401")
    time.sleep(0.5)
    assert http.get(served.url + "/health")[0] == 200
    assert served.engine == "vllm" or "Traceback" not in (served.root / "log").read_text()


def test_a_further_path_answers_under_the_same_key_and_limits(served: Served) -> None:
    if served.engine == "hf":
        pytest.skip("there are none")
    answer = served.client.completions.create(model="tiny", prompt="What", max_tokens=2)
    assert answer.choices[0].text and answer.usage.completion_tokens == 2
    assert http.get(served.url + "/v1/completions", {"model": "tiny", "prompt": "What"})[0] == 401
    for wrong in (IMAGE, "a" * (1 << 25)):
        with pytest.raises(openai.APIStatusError):
            served.client.completions.create(model="tiny", prompt=wrong, max_tokens=2)
    with pytest.raises(openai.NotFoundError):
        served.client.responses.create(model="tiny", input="What")


def test_a_crowd_gets_a_higher_ratio_and_says_so(served: Served) -> None:
    """But for a request that names its ratio; an image has 16 tokens."""
    small, over, before = http.image_url(6, 112, 112), threading.Event(), served.begun

    def wait(number: float) -> None:
        wait_for(lambda: served.begun >= before + number, 200)

    def hold() -> None:
        with served.ask(IMAGE, stream=True, max_tokens=7000) as stream:
            any(over.is_set() for _ in stream)

    with concurrent.futures.ThreadPoolExecutor(CROWD + 2) as pool:
        held = [pool.submit(hold) for _ in range(CROWD)]
        try:
            wait(CROWD)
            wait_for(lambda: http.metric(served.url, "tokencomp_load_step") == 1)
            asked = [pool.submit(served.ask, small), pool.submit(served.ask, small, ratio=0.25)]
            wait(CROWD + 2)
            assert http.metric(served.url, "tokencomp_load_step") == 1
        finally:
            over.set()
        saved = [answer.result().usage.model_extra["tokencomp"] for answer in asked]
    assert [s["requested"] for s in saved] == [{"ratio": 0.75}, {"ratio": 0.25}]
    assert [s["visual_tokens_after"] for s in saved] == [4, 12]
    assert all(answer.exception() is None for answer in held)


def test_running_requests_end_after_sigterm(served: Served) -> None:
    """Also those that wait. The last test of this module, as it ends the server."""
    tokens, before, deadline = 600, served.begun, time.monotonic() + 300

    def stream(i: int) -> str:
        chunks = list(served.ask(http.image_url(i), max_tokens=tokens, stream=True))
        return str([c.choices[0].finish_reason for c in chunks if c.choices][-1])

    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        plain = [pool.submit(served.ask, http.image_url(i), max_tokens=tokens) for i in range(6)]
        streams = [pool.submit(stream, i) for i in range(6)]
        while served.begun < before + 12:  # some may have ended before the last is accepted
            assert time.monotonic() < deadline
        os.kill(served.process.pid, signal.SIGTERM)
        assert not all(answer.done() for answer in (*plain, *streams))
        if served.engine == "vllm":
            while http.get(served.url + "/health")[0] == 200:
                assert time.monotonic() < deadline
            with pytest.raises(openai.APIStatusError) as error:
                served.ask(http.image_url(9))
            head = error.value.response.headers
            assert error.value.status_code == http.get(served.url + "/health")[0] == 503
            assert head["connection"] == "close" and int(head["retry-after"]) > 0
        assert {answer.result().usage.completion_tokens for answer in plain} == {tokens}
        assert {answer.result() for answer in streams} == {"length"}
    assert served.process.wait(timeout=60) is not None
