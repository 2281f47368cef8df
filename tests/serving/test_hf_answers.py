"""Penalties, log-probabilities, several answers and answers in JSON of the transformers server."""

from __future__ import annotations

import concurrent.futures
import json
import re
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("starlette")
import torch
from starlette.testclient import TestClient
from support.serving import hf_reference, http

from tokencomp.inputs.prompts import build_inputs
from tokencomp.serving.hf.app import build_app
from tokencomp.serving.hf.engine import Engine
from tokencomp.serving.hf.logits import BatchLogits
from tokencomp.serving.hf.metrics import Metrics
from tokencomp.serving.limits import Limits
from tokencomp.serving.media import load_image
from tokencomp.serving.spec import ServerOptions

CHAT = "/v1/chat/completions"
QUESTION = "What color is the circle?"
URLS = [http.image_url(1, 112, 112), http.image_url(2, 168, 84), http.image_url(3, 56, 56)]


@pytest.fixture(scope="module")
def app(tiny_folder: Any) -> Iterator[TestClient]:
    model, processor = hf_reference.load.__wrapped__(tiny_folder("qwen2_vl"))
    engine = Engine(model, processor, ServerOptions.parse({}, "hf"), Metrics(), wait=0.05)
    with TestClient(build_app(engine, "tiny", Limits())) as client:
        yield client


def body(url: str = URLS[0], **fields: Any) -> dict[str, Any]:
    messages = http.messages(QUESTION, url)
    return {"messages": messages, "max_tokens": 12, "temperature": 0, **fields}


def ask(app: TestClient, url: str = URLS[0], **fields: Any) -> dict[str, Any]:
    answer = app.post(CHAT, json=body(url, **fields))
    assert answer.status_code == 200, answer.text
    return answer.json()


def together(app: TestClient, requests: list[tuple[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    with concurrent.futures.ThreadPoolExecutor(len(requests)) as pool:
        return list(pool.map(lambda request: ask(app, request[0], **request[1]), requests))


def text(answer: dict[str, Any], index: int = 0) -> str:
    return answer["choices"][index]["message"]["content"]


def generated(folder: Any, url: str, **arguments: Any) -> tuple[Any, list[int], list[torch.Tensor]]:
    """Return tokenizer, tokens and their log-probabilities of a plain call of `generate`."""
    model, processor = hf_reference.load(folder)
    inputs = build_inputs(processor, [[load_image(url, Limits())]], [QUESTION])
    out = model.generate(
        **inputs, max_new_tokens=12, output_logits=True, return_dict_in_generate=True,
        **{"do_sample": False, **arguments},
    )  # fmt: skip
    tokens = out.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    return processor.tokenizer, tokens, [torch.log_softmax(x[0].float(), -1) for x in out.logits]


PENALTIES = {"repetition_penalty": 1.3, "presence_penalty": 0.7, "frequency_penalty": -0.4}


@pytest.mark.parametrize("name", PENALTIES)
def test_penalties_count_tokens_and_no_padding(name: str) -> None:
    """The second row is padded with token 0, which is neither in its prompt nor in its answer."""
    rows, prompts = [[3, 0, 4, 5, 5, 7], [0, 0, 3, 6, 6, 8]], (3, 1)
    scores = torch.linspace(-2, 2, 10).repeat(2, 1)
    fields = {**dict.fromkeys(PENALTIES), "logprobs": None, name: PENALTIES[name]}
    job: Any = SimpleNamespace(
        prompt=SimpleNamespace(request=SimpleNamespace(**fields)), grammar=None, done=False
    )
    mask = torch.tensor([[1, 1, 1], [0, 0, 1]])
    steps = BatchLogits([job, job], mask, 1.0, None)
    assert steps.needed
    steps(torch.tensor(rows)[:, :3], scores.clone())  # the first call is before the answer
    got = steps(torch.tensor(rows), scores.clone())
    for row, (tokens, prompt) in enumerate(zip(rows, prompts, strict=True)):
        seen = tokens[3 - prompt :]
        for token, value in enumerate(scores[row].tolist()):
            expected = value
            if name == "repetition_penalty" and token in seen:
                expected = value * 1.3 if value < 0 else value / 1.3
            if name == "presence_penalty":
                expected -= 0.7 * (token in tokens[3:])
            if name == "frequency_penalty":
                expected += 0.4 * tokens[3:].count(token)
            assert got[row, token].item() == pytest.approx(expected), (row, token)


def test_penalties_change_answers_in_any_batch(app: TestClient) -> None:
    requests = [(url, {name: value}) for url in URLS for name, value in PENALTIES.items()]
    alone = [text(ask(app, url, **fields)) for url, fields in requests]
    assert [text(answer) for answer in together(app, requests)] == alone
    assert len(set(alone)) > len(URLS)


@pytest.mark.parametrize(
    ("name", "greedy", "free"),
    [("temperature", 1e-4, 2), ("top_p", 1e-6, 1), ("top_k", 1, 0), ("min_p", 1, 0)],
)
def test_requests_that_sample_differently_do_not_share_a_batch(
    app: TestClient, name: str, greedy: float, free: float
) -> None:
    best = text(ask(app))
    sampled = {"temperature": 2, "ignore_eos": True}
    requests = [(URLS[0], {**sampled, name: value}) for value in (greedy, free) * 2]
    answers = [text(answer) for answer in together(app, requests)]
    assert answers[::2] == [best] * 2 and best not in answers[1::2]


def test_sampled_answers_are_those_of_generate(app: TestClient, tiny_folder: Any) -> None:
    sampled: list[dict[str, Any]]
    sampled = [{}, {"top_p": 0.7}, {"top_k": 3}, {"min_p": 0.3}, {"top_k": -1, "min_p": 0.0}]
    ask(app)  # the engine draws a new seed after an answer with one, so that has happened now
    expected = []
    for fields in sampled:
        named = {"top_k": 0, **{k: max(v, 0) for k, v in fields.items()}}  # no limit of 50 tokens
        torch.manual_seed(3)
        tokenizer, tokens, _ = generated(
            tiny_folder("qwen2_vl"), URLS[0], do_sample=True, temperature=1.5, **named
        )
        expected.append(tokenizer.decode(tokens, skip_special_tokens=True))
    assert [text(ask(app, temperature=1.5, seed=3, **fields)) for fields in sampled] == expected
    assert len(set(expected)) == 4  # the first and the last ask for the same


def test_settings_of_the_checkpoint_are_the_default(tiny_folder: Any) -> None:
    folder = tiny_folder("qwen2_vl")
    model, processor = hf_reference.load.__wrapped__(folder)
    model.generation_config.repetition_penalty = 1.3
    model.generation_config.top_k = 1
    engine = Engine(model, processor, ServerOptions.parse({}, "hf"), Metrics())
    with TestClient(build_app(engine, "tiny", Limits())) as client:
        for fields, penalty in (({}, 1.3), ({"repetition_penalty": 1}, 1.0)):
            tokenizer, tokens, _ = generated(folder, URLS[0], repetition_penalty=penalty)
            assert text(ask(client, **fields)) == tokenizer.decode(tokens, skip_special_tokens=True)
        hot = {"temperature": 2, "ignore_eos": True}
        assert len({text(ask(client, **hot)) for _ in "abc"}) == 1
        for every in (0, -1):
            assert len({text(ask(client, top_k=every, **hot)) for _ in "abc"}) == 3
        model.generation_config.update(do_sample=True, top_k=0, temperature=2.0)
        for temperature, answers in ((None, 3), (0, 1)):
            fields = {"temperature": temperature, "ignore_eos": True}
            assert len({text(ask(client, **fields)) for _ in "abc"}) == answers


def test_log_probabilities_are_those_of_the_model(app: TestClient, tiny_folder: Any) -> None:
    requests: list[tuple[str, dict[str, Any]]]
    requests = [(u, {"logprobs": True, "top_logprobs": k}) for u in URLS for k in (0, 3)]
    requests += [(URLS[0], {})]
    answers = together(app, requests)
    assert answers[-1]["choices"][0].get("logprobs") is None
    for (url, fields), answer in zip(requests[:-1], answers, strict=False):
        tokenizer, tokens, logprobs = generated(tiny_folder("qwen2_vl"), url)
        content = answer["choices"][0]["logprobs"]["content"]
        assert len(content) == len(tokens)
        for token, values, entry in zip(tokens, logprobs, content, strict=True):
            assert entry["token"] == tokenizer.decode([token])
            assert bytes(entry["bytes"]).decode(errors="replace") == entry["token"]
            assert entry["logprob"] == pytest.approx(values[token].item(), abs=1e-4)
            order = values.argsort(descending=True)[: fields["top_logprobs"]]
            top = [e["logprob"] for e in entry["top_logprobs"]]
            assert top == pytest.approx(values[order].tolist(), abs=1e-4)
    penalised = {"repetition_penalty": 1.3, "logprobs": True}
    answer = ask(app, **penalised)  # what the model says, before the penalty
    _, tokens, logprobs = generated(tiny_folder("qwen2_vl"), URLS[0], repetition_penalty=1.3)
    entries = answer["choices"][0]["logprobs"]["content"]
    for token, values, entry in zip(tokens, logprobs, entries, strict=True):
        assert entry["logprob"] == pytest.approx(values[token].item(), abs=1e-4)


def events(app: TestClient, **fields: Any) -> list[dict[str, Any]]:
    lines = app.post(CHAT, json=body(stream=True, **fields)).text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


def test_a_stream_has_the_same_text_and_log_probabilities(app: TestClient) -> None:
    fields = {"logprobs": True, "top_logprobs": 2}
    whole = ask(app, **fields)["choices"][0]
    written = whole["message"]["content"]
    stop = written[len(written) // 2 :][:3]
    for stops in (["no such text"], [stop]):
        choices = [event["choices"][0] for event in events(app, stop=stops, **fields)]
        streamed = "".join(c["delta"].get("content", "") for c in choices)
        entries = [entry for c in choices for entry in c["logprobs"]["content"]]
        cut = ask(app, stop=stops, **fields)["choices"][0]
        assert streamed == cut["message"]["content"] == written.partition(stops[0])[0]
        assert entries == cut["logprobs"]["content"] == whole["logprobs"]["content"][: len(entries)]
        reasons = {choices[-1]["finish_reason"], cut["finish_reason"]}
        assert reasons == {"stop" if stop in stops else whole["finish_reason"]}


def test_several_answers_are_those_of_several_requests(app: TestClient) -> None:
    sampled = {"temperature": 1.5, "seed": 5, "ignore_eos": True}
    single = [ask(app, **{**sampled, "seed": 5 + i}) for i in range(3)]
    answer = ask(app, **sampled, n=3)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert [text(answer, i) for i in range(3)] == [text(one) for one in single]
    assert len({text(one) for one in single}) == 3
    assert answer["usage"]["prompt_tokens"] == single[0]["usage"]["prompt_tokens"]
    assert answer["usage"]["completion_tokens"] == 36
    parts = ["", "", ""]
    chunks = events(app, **sampled, n=3, stream_options={"include_usage": True})
    for chunk in chunks:
        for choice in chunk["choices"]:
            parts[choice["index"]] += choice["delta"].get("content", "")
    assert parts == [text(one) for one in single]
    assert chunks[-1]["usage"] == answer["usage"]
    free = ask(app, temperature=1.5, n=4, ignore_eos=True)
    assert len({text(free, i) for i in range(4)}) > 1
    seeds = [(URLS[0], {**sampled, "seed": 5 + i % 3}) for i in range(9)]
    assert [text(one) for one in together(app, seeds)] == [text(one) for one in single] * 3


FIELDS = {
    "color": {"enum": ["red", "green"]}, "seen": {"type": "boolean"},
    "count": {"type": "integer", "minimum": 0, "maximum": 99},
}  # fmt: skip
SCHEMA = {"type": "object", "properties": FIELDS, "required": [*FIELDS]}
SCHEMA["additionalProperties"] = False
FORMAT = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA}}


def test_answers_follow_a_schema_and_neighbours_do_not_change(app: TestClient) -> None:
    pytest.importorskip("llguidance")
    plain = [ask(app, url, max_tokens=24) for url in URLS]
    formed = {"response_format": FORMAT, "max_tokens": 200}
    requests: list[tuple[str, dict[str, Any]]]
    requests = [(url, {"max_tokens": 24}) for url in URLS] + [(url, formed) for url in URLS[:2]]
    answers = together(app, requests)
    assert [text(a) for a in answers[:3]] == [text(a) for a in plain]
    for answer in [*answers[3:], ask(app, **formed, n=2, temperature=1.5, seed=3)]:
        for choice in answer["choices"]:
            value = json.loads(choice["message"]["content"])
            assert not re.search(r"\s{18}|\t", choice["message"]["content"])
            assert set(value) == {"color", "count", "seen"} and value["color"] in ("red", "green")
            assert 0 <= value["count"] <= 99 and isinstance(value["seen"], bool)
            assert choice["finish_reason"] == "stop"
    assert text(ask(app, response_format={"type": "json_object"})).startswith("{")
    assert text(ask(app, response_format={"type": "text"})) == text(ask(app))


@pytest.mark.parametrize(
    "wanted",
    [
        {"type": "json_schema"}, {"type": "xml"}, {"type": "json_object", "grammar": "x"},
        {"type": "json_schema", "json_schema": {"schema": {"type": "no"}}},
        {"type": "json_schema", "json_schema": {"schema": {"enum": ["x" * 70_000]}}},
    ],
)  # fmt: skip
def test_formats_that_cannot_be_followed_are_refused(app: TestClient, wanted: Any) -> None:
    pytest.importorskip("llguidance")
    assert app.post(CHAT, json=body(response_format=wanted)).status_code == 400


def test_without_the_grammar_library_json_is_refused(
    app: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    answer = app.post(CHAT, json=body(response_format={"type": "json_object"}))
    assert answer.status_code == 400 and "pip install llguidance" in answer.text
    assert ask(app, response_format={"type": "text"})
