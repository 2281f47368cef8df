"""Calls of tools on the transformers server: their form, the prompt, and the answer."""

from __future__ import annotations

import asyncio
import copy
import json
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("starlette")
from starlette.testclient import TestClient
from support.serving import hf_reference, http
from support.serving.doors import part
from support.serving.prompts import read as read_body

from tokencomp.serving.hf.answers import Completion
from tokencomp.serving.hf.app import build_app
from tokencomp.serving.hf.engine import Engine
from tokencomp.serving.hf.metrics import Metrics
from tokencomp.serving.hf.prompt import ChatPrompt, PromptText
from tokencomp.serving.hf.queue import Piece
from tokencomp.serving.hf.text import CallForm, Calls
from tokencomp.serving.limits import Limits, RequestError
from tokencomp.serving.spec import ServerOptions

CHAT = "/v1/chat/completions"
HEAD = "{% if tools %}Tools:{% for t in tools %} {{ t | tojson }}{% endfor %}\n{% endif %}"
BODY = (
    "{% for m in messages %}[{{ m.role }}] {% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{% if p.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %}{% endif %}"
    "{% for c in m.tool_calls or [] %}\nCALL: CALLS END{% endfor %}\n{% endfor %}[assistant] "
)
WRITTEN = '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}'
TEMPLATE = HEAD + BODY.replace("CALLS", WRITTEN)
FORM = CallForm("CALL: ", "END")
FIELDS = {"x": {"type": "integer", "minimum": 0, "maximum": 99}, "on": {"enum": ["a", "b"]}}
SCHEMA = {"type": "object", "properties": FIELDS, "required": [*FIELDS]}
SCHEMA["additionalProperties"] = False
CLICK = {"type": "function", "function": {"name": "click", "parameters": SCHEMA}}
WAIT = {"type": "function", "function": {"name": "wait"}}


def written(name: str, **arguments: Any) -> str:
    return f"\nCALL: {json.dumps({'name': name, 'arguments': arguments})} END"


def described(words: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "a", "description": words}}


def called(arguments: str) -> dict[str, Any]:
    return {"function": {"name": "a", "arguments": arguments}}


def read(calls: list[dict[str, Any]]) -> list[tuple[str, Any]]:
    return [(c["function"]["name"], json.loads(c["function"]["arguments"])) for c in calls]


@pytest.fixture(scope="module")
def parts(tiny_folder: Any) -> tuple[Any, Any]:
    model, processor = hf_reference.load.__wrapped__(tiny_folder("qwen2_vl"))
    processor.chat_template = TEMPLATE
    return model, processor


@pytest.fixture(scope="module")
def text(parts: Any) -> PromptText:
    return PromptText(parts[1], 4096)


@pytest.fixture(scope="module")
def app(parts: Any) -> Iterator[TestClient]:
    engine = Engine(*parts, ServerOptions.parse({}, "hf"), Metrics(), wait=0.0)
    with TestClient(build_app(engine, "tiny", Limits())) as client:
        yield client


def body(**fields: Any) -> dict[str, Any]:
    messages = http.messages("Click on it.", http.image_url(1, 112, 112))
    return {"messages": messages, "max_tokens": 120, "temperature": 0, **fields}


def prompt(text: PromptText, **fields: Any) -> ChatPrompt:
    return read_body(body(**fields), text)


# -- the form ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "form"),
    [
        (TEMPLATE, FORM),
        (TEMPLATE.replace("CALL: ", "<tool_call>\n").replace(" END", "</tool_call>"),
         CallForm("<tool_call>\n", "</tool_call>")),
        (BODY, None),  # no place for tools
        (HEAD + BODY, None),  # none for calls
        (TEMPLATE.replace("CALL:", "<|im_start|>"), None),  # a special token, which is not decoded
        (TEMPLATE.replace("CALL:", ""), None),  # a call that nothing tells from an answer
        (TEMPLATE.replace('"arguments": ', '"id": 1, "arguments": '), None),
        (TEMPLATE.replace("{% for m", "{{ raise_exception('no') }}{% for m"), None),
    ],
)  # fmt: skip
def test_the_form_of_calls_is_found_in_the_template(
    parts: Any, template: str, form: CallForm | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts[1], "chat_template", template)
    assert PromptText(parts[1], 4096).calls == form


# -- the prompt ----------------------------------------------------------------------------------


def test_tools_calls_and_results_reach_the_chat_template(parts: Any, text: PromptText) -> None:
    call = {"id": "c1", "type": "function",
            "function": {"name": "click", "arguments": '{"x": 1, "on": "a"}'}}  # fmt: skip
    said = {"role": "assistant", "content": None, "tool_calls": [call]}
    results = "done", [part(http.image_url(2, 56, 56))]
    messages = [*body()["messages"], said]
    messages += [{"role": "tool", "tool_call_id": "c1", "content": result} for result in results]
    made = prompt(text, messages=messages, tools=[CLICK, WAIT])
    call = {**call, "function": {"name": "click", "arguments": {"x": 1, "on": "a"}}}
    chat = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Click on it."}]},
        {**said, "content": [], "tool_calls": [call]},
        {"role": "tool", "content": "done"},
        {"role": "tool", "content": [{"type": "image"}]},
    ]
    expected = parts[1].apply_chat_template(chat, tools=[CLICK, WAIT], tokenize=False)
    assert made.text == expected and len(made.images) == 2
    assert '"x": 1' in expected and "[tool] done" in expected
    assert prompt(text, tools=[CLICK], tool_choice="none").text == prompt(text).text
    assert prompt(text, tools=[CLICK], tool_choice="none").calls is None


WRONG: list[dict[str, Any]] = [
    {"tools": [{"type": "function", "function": {"name": "a b"}}]},
    {"tools": [{**CLICK, "x": 1}]},
    {"tool_choice": "required"},
    {"tools": [CLICK], "tool_choice": "sometimes"},
    {"tools": [CLICK], "tool_choice": {**WAIT}},
    {"tools": [CLICK], "tool_choice": "required", "ignore_eos": True},
    {"tools": [CLICK], "response_format": {"type": "json_object"}},
    {"tools": [described("<|image_pad|>")]},
    {"tools": [described("a " * 10**6)]},
    {"messages": [{"role": "user", "content": "a", "tool_calls": [called("{}")]}]},
    {"messages": [{"role": "user", "content": "a", "tool_call_id": "a"}]},
    {"messages": [{"role": "tool", "tool_call_id": "a"}]},
    {"messages": [{"role": "assistant", "tool_calls": [called("[1]")]}]},
]


@pytest.mark.parametrize("fields", WRONG, ids=range(len(WRONG)))
def test_wrong_tools_and_messages_are_refused(text: PromptText, fields: Any) -> None:
    with pytest.raises(RequestError) as error:
        prompt(text, **fields)
    assert error.value.status == 400


def test_models_without_tools_refuse_them(tiny_folder: Any) -> None:
    text = PromptText(hf_reference.load(tiny_folder("qwen2_vl"))[1], 4096)
    assert text.calls is None
    for fields in ({"tools": [CLICK]}, {"messages": [{"role": "tool", "content": "a"}]}):
        with pytest.raises(RequestError):
            prompt(text, **fields)
    assert prompt(text, tools=[], tool_choice="none")


# -- the answer ----------------------------------------------------------------------------------

ANSWERS: list[tuple[str, str, list[tuple[str, Any]]]] = [
    ("Red.", "Red.", []),
    ("I click." + written("click", x=1, on="a"), "I click.", [("click", {"x": 1, "on": "a"})]),
    (written("wait") + written("click", x=2) + "\n", "", [("wait", {}), ("click", {"x": 2})]),
    (written("click", on="an END in it"), "", [("click", {"on": "an END in it"})]),
    (written("other"), written("other"), []),
    ("\nCALL: {} END", "\nCALL: {} END", []),
    ("\nCALL: [1] END", "\nCALL: [1] END", []),
    ("\nCALL: {\"name\": \"wait\", \"arg", "\nCALL: {\"name\": \"wait\", \"arg", []),  # cut off
    ("A CAL of CALLS.  ", "A CAL of CALLS.  ", []),
    ("\nCALL: " + "[" * 100_000 + " END", "\nCALL: " + "[" * 100_000 + " END", []),
]  # fmt: skip


@pytest.mark.parametrize(("answer", "content", "calls"), ANSWERS)
def test_calls_are_read_whole_and_in_any_pieces(answer: str, content: str, calls: Any) -> None:
    for size in (len(answer), 1, 3) if len(answer) < 1000 else (len(answer),):
        reader, got = Calls(FORM, ["click", "wait"]), ""
        for start in range(0, len(answer), size):
            got += reader.add(answer[start : start + size])[0]
        got += reader.add("", final=True)[0]
        assert got == content and read(reader.found) == calls
    assert len({call["id"] for call in reader.found}) == len(calls)
    assert Calls().add(answer) == (answer, [])


def test_what_a_template_writes_is_read_back(parts: Any, text: PromptText) -> None:
    arguments = {"x": 3, "on": 'a "quoted"\nline é', "deep": {"a": [1, None]}}
    call = {"type": "function", "function": {"name": "click", "arguments": arguments}}
    chat = [{"role": "assistant", "content": "Now.", "tool_calls": [call, call]}]
    answer = parts[1].apply_chat_template(chat, tokenize=False)
    answer = answer.removeprefix("[assistant] ").removesuffix("[assistant] ")
    content, calls = Calls(text.calls, ["click"]).add(answer, final=True)
    assert content == "Now." and read(calls) == [("click", arguments)] * 2


@pytest.mark.parametrize("finish", ["stop", "length"])
@pytest.mark.parametrize(("answer", "content", "calls"), ANSWERS[:3])
def test_answers_have_the_form_of_the_api(
    text: PromptText, answer: str, content: str, calls: Any, finish: str
) -> None:
    """An answer that reached its length may lack further calls, so it says so."""

    async def run() -> tuple[dict[str, Any], list[dict[str, Any]]]:
        made = [Completion(prompt(text, tools=[CLICK, WAIT]), text.tokenizer, {}) for _ in "ab"]
        for completion in made:
            for letter in answer:
                completion.events.put_nowait((0, "text", Piece(letter, [])))
            completion.events.put_nowait((0, "end", finish))
        whole = await made[0].whole(made[0].events.get)
        events = [event async for event in made[1].stream()]
        return whole, [json.loads(event[6:]) for event in events[:-1]]

    whole, chunks = asyncio.run(run())
    choice = whole["choices"][0]
    assert choice["message"]["content"] == (content or None)
    assert read(choice["message"].get("tool_calls", [])) == calls
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert "".join(delta.get("content", "") for delta in deltas) == content
    sent = [call for delta in deltas for call in delta.get("tool_calls", [])]
    assert read(sent) == calls and [call["index"] for call in sent] == [*range(len(calls))]
    reason = chunks[-1]["choices"][0]["finish_reason"]
    whole_calls = calls and finish == "stop"
    assert reason == choice["finish_reason"] == ("tool_calls" if whole_calls else finish)


def test_an_answer_that_must_be_a_call_is_one(app: TestClient) -> None:
    pytest.importorskip("llguidance")
    named = {"type": "function", "function": {"name": "click"}}
    for choice, names in (("required", {"click", "wait"}), (named, {"click"})):
        fields = {"tools": [copy.deepcopy(CLICK), WAIT], "tool_choice": choice, "max_tokens": 300}
        whole = app.post(CHAT, json=body(**fields, n=2, temperature=1.0, seed=1))
        assert whole.status_code == 200, whole.text
        for answer in whole.json()["choices"]:
            assert answer["finish_reason"] == "tool_calls" and answer["message"]["content"] is None
            ((name, arguments),) = read(answer["message"]["tool_calls"])
            assert name in names
            if name == "click":
                assert set(arguments) == {"x", "on"} and 0 <= arguments["x"] <= 99
    greedy = app.post(CHAT, json=body(**fields)).json()["choices"][0]["message"]["tool_calls"]
    events = app.post(CHAT, json=body(**fields, stream=True)).text.split("\n\n")
    deltas = [json.loads(e[6:])["choices"][0]["delta"] for e in events if e.startswith("data: {")]
    assert read([c for d in deltas for c in d.get("tool_calls", [])]) == read(greedy)
