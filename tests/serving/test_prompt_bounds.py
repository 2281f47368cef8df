"""A prompt that cannot fit is refused before the engine's thread sees it, and so are tricks."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("pydantic")
from support.serving import hf_reference, http
from support.serving.doors import part, user
from support.serving.prompts import read

from tokencomp.inputs.loading import load_model
from tokencomp.inputs.prompts import chat_inputs, prompt_lengths
from tokencomp.serving.hf.engine import Engine
from tokencomp.serving.hf.metrics import Metrics
from tokencomp.serving.hf.prompt import ChatPrompt, PromptText
from tokencomp.serving.hf.queue import Waiting
from tokencomp.serving.limits import RequestError
from tokencomp.serving.spec import ServerOptions

LENGTH = 512
VIDEO, IMAGE = part("data:video/mp4;base64,AAAA"), part(http.image_url(1, 28, 28))


@pytest.fixture(scope="module")
def text(tiny_folder: Any) -> PromptText:
    return PromptText(hf_reference.load(tiny_folder("qwen2_vl"))[1], LENGTH)


def said(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def prompt(body: Any, text: PromptText) -> ChatPrompt:
    return read(body, text)


def test_text_that_cannot_fit_is_not_tokenised(
    text: PromptText, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Megabytes of text, which a tokenizer takes seconds for."""
    longest = max(map(len, text.tokenizer.get_vocab()))
    assert text.max_characters == longest * LENGTH
    calls: list[Any] = []
    tokenizer = lambda words, **options: calls.append(words) or {"input_ids": [0]}  # noqa: E731
    monkeypatch.setattr(text, "tokenizer", tokenizer)
    half = "a " * (longest * LENGTH // 4 + 1)
    for body in (
        user("ab " * 10**6),
        user(*[said(half)] * 2),
        user(*[said("")] * (LENGTH + 1)),
        {"messages": [{"role": "user", "content": "a"}] * (LENGTH + 1)},
    ):
        with pytest.raises(RequestError, match="cannot fit: this model takes 512 tokens"):
            prompt(body, text)
    assert not calls
    prompt(user(half), text)
    assert len(calls) == 1


def test_tokens_are_counted_before_media_are_decoded(text: PromptText) -> None:
    broken, long = part("data:image/png;base64,broken"), said("What " * LENGTH)
    with pytest.raises(RequestError, match="tokens before compression; this model takes 512"):
        prompt(user(long, broken), text)
    with pytest.raises(RequestError, match="base64"):
        prompt(user(broken), text)
    assert not prompt(user(IMAGE, said("What?")), text).alone


@pytest.mark.parametrize("name", ["qwen2_vl", "llava_onevision"])
def test_tokens_of_images_are_counted_before_the_processor_runs(
    name: str, tiny_folder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = hf_reference.load(tiny_folder(name))
    body = user(*(part(http.image_url(seed, 112 + 56 * seed, 196)) for seed in (1, 2)))
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
    waiting = Waiting(max_waiting=2)
    waiting.jobs.extend(waiting_jobs(60, 40))
    with pytest.raises(RequestError, match="busy"):
        waiting.check_room()
    waiting.jobs[0].cancelled = True
    waiting.check_room()
    with pytest.raises(RequestError, match="busy"):
        waiting.check_room(2)


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
    for content in ([f"a {token}"], [IMAGE, said(token)]):
        with pytest.raises(RequestError, match="one placeholder per image and video"):
            prompt(user(*content), text)


@pytest.mark.parametrize("token", ["<image_soft_token>", "<start_of_image>"])
def test_placeholders_that_the_processor_writes_are_refused(token: str) -> None:
    """The template of Gemma 3 writes another placeholder than the model reads."""
    options = ServerOptions.parse({}, "hf")
    engine = Engine(*load_model("tiny-gemma3", device="cpu"), options, Metrics())
    engine.close()
    gemma = engine.text
    assert not prompt(user(IMAGE), gemma).alone
    for content in ([f"a {token}"], [IMAGE, said(token)]):
        with pytest.raises(RequestError, match="one placeholder per image and video"):
            prompt(user(*content), gemma)
    with pytest.raises(RequestError, match="takes no videos"):
        prompt(user(VIDEO), gemma)


def test_media_that_a_template_leaves_out_are_refused(text: PromptText) -> None:
    def only_text(chat: Any, **options: Any) -> str:
        return "".join(p["text"] for m in chat for p in m["content"] if p["type"] == "text")

    processor = SimpleNamespace(tokenizer=text.tokenizer, apply_chat_template=only_text)
    unmarked = PromptText(processor, LENGTH)
    assert prompt(user(IMAGE), unmarked).alone and not prompt(user("a"), unmarked).alone
    unmarked.markers = text.markers
    with pytest.raises(RequestError, match="chat template leaves media of this role out"):
        prompt(user(IMAGE), unmarked)


def fields(**more: Any) -> Any:
    return user("a", **more)


CALLED = {"name": "f", "arguments": "{}"}
DEEP, DIGITS = "[" * 10**5, "1" * 5000
REFUSED: dict[str, Any] = {
    "no message": {"messages": []}, "long name": fields(**{"x" * 10**5: 1}),
    "reducer": fields(tokencomp={"reducer": "x" * 10**5}),
    "large ratio": fields(tokencomp={"ratio": 10**400}),
    "nan": fields(tokencomp={"ratio": float("nan")}),
    "in the other field": fields(mm_processor_kwargs={"tokencomp": {"ratio": 7}}),
    "deep": fields(mm_processor_kwargs={"tokencomp": DEEP}),
    "digits": fields(mm_processor_kwargs={"tokencomp": DIGITS}),
    "deep options": fields(mm_processor_kwargs={"tokencomp": {"options": DEEP}}),
    "surrogate": fields(mm_processor_kwargs={"tokencomp": r'{"reducer": "\ud800"}'}),
    "digits of options": fields(mm_processor_kwargs={"tokencomp": {"options": DIGITS}}),
    "pixels": fields(mm_processor_kwargs={"max_pixels": 10**9}),
    "no key": fields(ratio=0.5), "other key": fields(mm_processor_kwargs={"tower_ratio": 0.5}),
    "prompt": fields(add_generation_prompt=False), "special": fields(skip_special_tokens=False),
    "length": fields(length_penalty=0.5), "bias": fields(logit_bias={"5": 1}),
    "least": fields(min_tokens=3), "anything": fields(anything=False),
    "usage": fields(stream_options={"continuous_usage_stats": True}),
    "top_k": fields(top_k=-2), "top_p": fields(top_p=0), "min_p": fields(min_p=2), "n": fields(n=0),
    "n of 17": fields(n=17), "n of x": fields(n="x"), "no token": fields(max_tokens=0),
    "long answer": fields(max_tokens=10**9),
    "long completion": fields(max_completion_tokens=10**9),
    "frequency": fields(frequency_penalty=2.5), "presence": fields(presence_penalty=-3),
    "temperature": fields(temperature=2.1), "stop": fields(stop=3),
    "stops": fields(stop=["a"] * 17),
    "long stop": fields(stop="a" * 257), "long stops": fields(stop=["a" * 257]),
    "top logprobs": fields(top_logprobs=3), "many": fields(logprobs=True, top_logprobs=21),
    "function": {"messages": [{"role": "function", "content": "1", "name": "a"}]},
    "old call": {"messages": [{"role": "assistant", "content": "", "function_call": CALLED}]},
    "size": user({**IMAGE, "max_pixels": 0}), "no content": {"messages": [{"role": "user"}]},
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_this_server_does_not_serve_is_refused(name: str, text: PromptText) -> None:
    """On vLLM, what the fields mean is vLLM's matter. test_doors has what both refuse."""
    with pytest.raises(RequestError) as error:
        prompt(REFUSED[name], text)
    body = error.value.body()["error"]
    assert body["code"] == 400 and len(body["message"]) <= 500
    assert json.dumps(body, ensure_ascii=False).encode()


def test_fields_that_ask_for_what_is_done_anyway_are_taken(text: PromptText) -> None:
    same = dict(add_generation_prompt=True, skip_special_tokens=True, length_penalty=1, n=None)
    same |= dict(anything=None, user="me", tool_choice="none", frequency_penalty=0, stream=None)
    same |= dict(response_format={"type": "text"}, modalities=["text"], temperature=1e-40)
    usage = {"include_usage": True, "include_obfuscation": False}
    turns = [{"role": "developer", "content": "Be brief."}, {"role": "assistant", "content": None}]
    body = {"messages": [*turns, *user("a")["messages"]], "stream_options": usage, **same}
    assert prompt({**body, "stop": ["a"] * 16}, text).request.n == 1


def test_names_of_speakers_reach_the_chat_template(text: PromptText) -> None:
    assert "name" not in prompt(user("a"), text).chat[0]
    named = {"messages": [{"role": "user", "content": "a", "name": "Ann"}]}
    assert prompt(named, text).chat[0]["name"] == "Ann"
    named["messages"][0]["name"] = "a" * 10**6
    with pytest.raises(RequestError, match="cannot fit"):
        prompt(named, text)
