"""A prompt that cannot fit is refused before the engine's thread sees it, and so are tricks."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("pydantic")
from support.serving import hf_reference, http
from support.serving.prompts import read

from tokencomp.inputs.loading import load_model
from tokencomp.inputs.prompts import chat_inputs, prompt_lengths
from tokencomp.serving.hf.engine import Engine
from tokencomp.serving.hf.fields import read_request
from tokencomp.serving.hf.metrics import Metrics
from tokencomp.serving.hf.prompt import Prompt, PromptText
from tokencomp.serving.hf.queue import Waiting
from tokencomp.serving.limits import MAX_MESSAGE, MAX_STRUCTURE, RequestError
from tokencomp.serving.spec import ServerOptions

LENGTH = 512
VIDEO = {"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AAAA"}}
IMAGE = {"type": "image_url", "image_url": {"url": http.image_url(1, 28, 28)}}


@pytest.fixture(scope="module")
def text(tiny_folder: Any) -> PromptText:
    return PromptText(hf_reference.load(tiny_folder("qwen2_vl"))[1], LENGTH)


def user(content: Any, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}], **more}


def prompt(body: Any, text: PromptText) -> Prompt:
    return read(body, text)


def test_text_that_cannot_fit_is_not_tokenised(
    text: PromptText, monkeypatch: pytest.MonkeyPatch
) -> None:
    longest = max(map(len, text.tokenizer.get_vocab()))
    assert text.max_characters == longest * LENGTH
    calls: list[Any] = []
    tokenizer = lambda words, **options: calls.append(words) or {"input_ids": [0]}  # noqa: E731
    monkeypatch.setattr(text, "tokenizer", tokenizer)
    half = "a " * (longest * LENGTH // 4 + 1)
    for body in (
        user("ab " * 10**6),
        user([{"type": "text", "text": half}] * 2),
        user([{"type": "text", "text": ""}] * (LENGTH + 1)),
        {"messages": [{"role": "user", "content": "a"}] * (LENGTH + 1)},
    ):
        with pytest.raises(RequestError, match="cannot fit: this model takes 512 tokens"):
            prompt(body, text)
    assert not calls
    prompt(user(half), text)
    assert len(calls) == 1


def test_tokens_are_counted_before_media_are_decoded(text: PromptText) -> None:
    broken = {"type": "image_url", "image_url": {"url": "data:image/png;base64,broken"}}
    long = {"type": "text", "text": "What " * LENGTH}
    with pytest.raises(RequestError, match="tokens before compression; this model takes 512"):
        prompt(user([long, broken]), text)
    with pytest.raises(RequestError, match="base64"):
        prompt(user([broken]), text)
    assert not prompt(user([IMAGE, {"type": "text", "text": "What?"}]), text).alone


@pytest.mark.parametrize("name", ["qwen2_vl", "llava_onevision"])
def test_tokens_of_images_are_counted_before_the_processor_runs(
    name: str, tiny_folder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = hf_reference.load(tiny_folder(name))
    urls = [http.image_url(seed, 112 + 56 * seed, 196) for seed in (1, 2)]
    body = user([*({"type": "image_url", "image_url": {"url": url}} for url in urls)])
    loaded = prompt(body, PromptText(processor, 10**5))
    inputs = chat_inputs(processor, [loaded.chat], loaded.images, [])
    ((total, _),) = prompt_lengths(model, inputs)
    monkeypatch.setattr(type(processor), "__call__", None)
    assert prompt(body, PromptText(processor, total + 1))
    with pytest.raises(RequestError, match=f"has {total} tokens before compression"):
        prompt(body, PromptText(processor, total))


def waiting_jobs(*pixels: int) -> list[Any]:
    return [
        SimpleNamespace(cancelled=False, group=0, prompt=SimpleNamespace(pixels=p)) for p in pixels
    ]


def test_clients_that_have_left_do_not_fill_the_queue() -> None:
    waiting = Waiting(max_waiting=2, max_waiting_pixels=100)
    waiting.jobs.extend(waiting_jobs(60, 40))
    for pixels in (0, 60):
        with pytest.raises(RequestError, match="busy"):
            waiting.check_room(pixels)
    waiting.jobs[0].cancelled = True
    waiting.check_room(60)
    with pytest.raises(RequestError, match="busy"):
        waiting.check_room(61)


def test_a_batch_has_a_limit_of_pixels() -> None:
    jobs = waiting_jobs(30, 200, 60, 20, 20, 100)
    waiting = Waiting(max_batch=3, max_batch_pixels=100)
    waiting.jobs.extend(jobs)
    batches = []
    while waiting.jobs:
        batches.append([job.prompt.pixels for job in waiting.take()])
    assert batches == [[30], [200], [60, 20, 20], [100]]


@pytest.mark.parametrize("token", ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>"])
def test_placeholders_in_a_text_are_refused(token: str, text: PromptText) -> None:
    """They would take the media of another request in the batch."""
    for content in (f"a {token}", [IMAGE, {"type": "text", "text": token}]):
        with pytest.raises(RequestError, match="one placeholder per image and video"):
            prompt(user(content), text)


@pytest.mark.parametrize("token", ["<image_soft_token>", "<start_of_image>"])
def test_placeholders_that_the_processor_writes_are_refused(token: str) -> None:
    """The template of Gemma 3 writes another placeholder than the model reads."""
    options = ServerOptions.parse({}, "hf")
    engine = Engine(*load_model("tiny-gemma3", device="cpu"), options, Metrics())
    engine.close()
    gemma = engine.text
    assert not prompt(user([IMAGE]), gemma).alone
    for content in (f"a {token}", [IMAGE, {"type": "text", "text": token}]):
        with pytest.raises(RequestError, match="one placeholder per image and video"):
            prompt(user(content), gemma)
    with pytest.raises(RequestError, match="takes no videos"):
        prompt(user([VIDEO]), gemma)


def test_media_that_a_template_leaves_out_are_refused(text: PromptText) -> None:
    def only_text(chat: Any, **options: Any) -> str:
        return "".join(p["text"] for m in chat for p in m["content"] if p["type"] == "text")

    processor = SimpleNamespace(tokenizer=text.tokenizer, apply_chat_template=only_text)
    unmarked = PromptText(processor, LENGTH)
    assert prompt(user([IMAGE]), unmarked).alone and not prompt(user("a"), unmarked).alone
    unmarked._markers = text._markers
    with pytest.raises(RequestError, match="chat template leaves media of this role out"):
        prompt(user([IMAGE]), unmarked)


def test_bodies_are_bounded_by_their_structure() -> None:
    good = json.dumps(user("a", metadata=[])).encode()
    assert read_request(good)
    with pytest.raises(RequestError, match="JSON values") as error:
        read_request(good.replace(b"[]", b"[" + b"{}," * (MAX_STRUCTURE // 2) + b"{}]"))
    assert error.value.status == 413


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"[]", b"null", b"3", b"\xff", b"[" * 10**5, b'{"messages": []}',
        rb'{"mm_processor_kwargs": {"\ud800": 1}, "messages": [{"role": "user", "content": "a"}]}',
        json.dumps(user("a", **{"x" * 10**5: 1})).encode(),
        json.dumps(user("a", tokencomp={"reducer": "x" * 10**5})).encode(),
        json.dumps(user("a", tokencomp={"ratio": 10**400})).encode(),
        json.dumps(user("a", tokencomp={"ratio": float("nan")})).encode(),
        *(
            json.dumps(user("a", mm_processor_kwargs={"tokencomp": value})).encode()
            for text in ("[" * 10**5, "1" * 5000)
            for value in (text, {"options": text})
        ),
        json.dumps({"messages": [3] * 10**5}).encode(),
        json.dumps(user([{"type": "x"}] * 10**5)).encode(),
    ],
    ids=range(19),
)  # fmt: skip
def test_malformed_bodies_have_an_error_that_can_be_sent(content: bytes, text: PromptText) -> None:
    with pytest.raises(RequestError) as error:
        read(content, text)
    assert error.value.status == 400
    body = json.dumps(error.value.body()).encode()
    assert len(error.value.body()["error"]["message"]) <= MAX_MESSAGE and body


def test_low_detail_has_the_ratio_of_the_operator(text: PromptText) -> None:
    server = ServerOptions.parse(
        {"ratio": 0.5, "reducer": "uniform", "low_detail_ratio": 0.9, "per_request": False}, "hf"
    )
    low = {**IMAGE, "image_url": {**IMAGE["image_url"], "detail": "low"}}
    high = {**IMAGE, "image_url": {**IMAGE["image_url"], "detail": "high"}}
    video = {"type": "video_url", "video_url": {"url": http.video_url(1, 2, 28, 28)}}

    def spec(parts: Any, options: ServerOptions = server, **more: Any) -> Any:
        return read(user(parts, **more), text, options).spec

    assert (spec([low, low]).ratio, spec([high]).ratio, spec([IMAGE]).ratio) == (0.9, 0.5, 0.5)
    assert spec([low, video]).ratios == {"image": 0.9, "video": 0.5}
    assert spec([low]).reducer.name == "uniform"
    free = ServerOptions.parse({"low_detail_ratio": 0.9}, "hf")
    assert spec([low], free, tokencomp={"ratio": 0.25}).ratio == 0.25
    for parts, options, words in (
        ([low, IMAGE], server, "all images of a request share it"),
        ([low], ServerOptions.parse({}, "hf"), "--low-detail-ratio"),
        ([{**video, "video_url": {**video["video_url"], "detail": "low"}}], server, "for images"),
    ):
        with pytest.raises(RequestError, match=words):
            spec(parts, options)


def test_two_settings_in_one_request_must_be_equal(text: PromptText) -> None:
    half = {"ratio": 0.5, "reducer": "uniform"}

    def settings(own: Any, processor: Any) -> Prompt:
        return prompt(user("a", tokencomp=own, mm_processor_kwargs={"tokencomp": processor}), text)

    assert settings(half, {"reducer": "uniform", "ratio": 0.5}).spec.ratio == 0.5
    assert settings(half, None).spec == settings(None, half).spec
    with pytest.raises(RequestError, match="two settings"):
        settings(half, {**half, "ratio": 0.4})
    with pytest.raises(RequestError, match="ratio=7"):
        settings(half, {"ratio": 7})


def test_an_error_may_quote_what_cannot_be_sent() -> None:
    assert RequestError("a \ud800").body()["error"]["message"] == "a \\ud800"


def test_fields_are_refused_unless_they_ask_for_what_is_done_anyway() -> None:
    for name, same, other in (
        ("add_generation_prompt", True, False),
        ("skip_special_tokens", True, False),
        ("length_penalty", 1, 0.5),
        ("anything", None, False),
    ):
        assert read_request(json.dumps(user("a", **{name: same})).encode())
        with pytest.raises(RequestError, match=f"not served: {name}"):
            read_request(json.dumps(user("a", **{name: other})).encode())


def test_fields_inside_of_messages_are_refused_unless_they_are_empty() -> None:
    """A message as a client has received it passes; options of media do not."""
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    url = IMAGE["image_url"]
    received = {
        "role": "assistant", "content": "Red.", "refusal": None, "annotations": [], "audio": None,
        "function_call": None, "tool_calls": [],
    }  # fmt: skip

    def received_by(*messages: Any, **more: Any) -> Any:
        return read_request(json.dumps({"messages": [*messages], **more}).encode())

    def said(content: Any) -> dict[str, Any]:
        return {"role": "user", "content": content}

    good = said([{**IMAGE, "image_url": {**url, "detail": "auto"}}])
    usage = {"include_usage": True, "include_obfuscation": False}
    assert received_by(good, received, said("Why?"), stream_options=usage)
    for name, message in (
        ("messages.0.function_call", {**received, "function_call": call["function"]}),
        ("messages.0.content.0.fps", said([{**IMAGE, "fps": 2}])),
        ("messages.0.content.0.max_pixels", said([{**IMAGE, "max_pixels": 0}])),
    ):
        with pytest.raises(RequestError, match=f"not served: {name}. Leave it out"):
            received_by(message)
    with pytest.raises(RequestError, match=r"role.*'assistant'"):
        received_by({"role": "function", "content": "1", "name": "a"})
    with pytest.raises(RequestError, match=r"stream_options\.continuous_usage_stats"):
        received_by(said("a"), stream_options={"continuous_usage_stats": True})


def test_names_of_speakers_reach_the_chat_template(text: PromptText) -> None:
    assert "name" not in prompt(user("a"), text).chat[0]
    named = {"messages": [{"role": "user", "content": "a", "name": "Ann"}]}
    assert prompt(named, text).chat[0]["name"] == "Ann"
    named["messages"][0]["name"] = "a" * 10**6
    with pytest.raises(RequestError, match="cannot fit"):
        prompt(named, text)


def test_options_in_the_wrong_place_are_answered_with_the_right_one() -> None:
    for wrong in ({"ratio": 0.5}, {"mm_processor_kwargs": {"tower_ratio": 0.5}}):
        with pytest.raises(RequestError, match=r'ratio\. Write it as "tokencomp": {"ratio"'):
            read_request(json.dumps(user("a", **wrong)).encode())
