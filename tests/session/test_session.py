"""`tokencomp.Session` on an embedded model: equal to one prompt, without a trace, in a budget."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import tokencomp
from tokencomp import zoo
from tokencomp.errors import (
    FrameChoiceWarning,
    FrameOrderError,
    MediaError,
    OptionError,
    SessionError,
    UnsupportedModelError,
)
from tokencomp.inputs.media import load_media
from tokencomp.inputs.prompts import build_inputs
from tokencomp.inputs.video import Video

KCENTER = {"reducer": "kcenter"}


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    return zoo.load("tiny-qwen3-vl")


@pytest.fixture(scope="module")
def clip() -> tuple[list[Image.Image], str, str]:
    """Eight small frames, a question about them, and its answer."""
    items = json.loads((zoo.SAMPLES / "questions.json").read_text())
    item = next(q for q in items if q["kind"] == "video")
    frames = load_media(zoo.SAMPLES / item["media"], frames=8)
    return list(frames), item["question"], item["answer"]


class Record:
    """What a model is called with, and the logits that it returns."""

    def __init__(self, model: Any) -> None:
        self.calls: list[dict[str, Any]] = []
        self.logits: list[Tensor] = []
        before = model.register_forward_pre_hook(
            lambda m, args, kwargs: self.calls.append(dict(kwargs)), with_kwargs=True
        )
        after = model.register_forward_hook(
            lambda m, args, out: self.logits.append(out.logits[:, -1])
        )
        self.hooks = [before, after]

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()

    def one_prompt(self) -> dict[str, Tensor]:
        """All calls as one prompt, for which the model computes the positions itself."""
        joined = {}
        ids = [call["input_ids"] for call in self.calls]
        types = [
            call.get("mm_token_type_ids", torch.zeros_like(own).int())
            for call, own in zip(self.calls, ids, strict=True)
        ]
        joined["input_ids"] = torch.cat(ids, 1)
        joined["mm_token_type_ids"] = torch.cat([t.int() for t in types], 1)
        joined["attention_mask"] = torch.ones_like(joined["input_ids"])
        for name in ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw"):
            found = [call[name] for call in self.calls if name in call]
            if found:
                joined[name] = torch.cat(found)
        return joined


@pytest.fixture
def record(loaded: tuple[Any, Any]) -> Iterator[Record]:
    found = Record(loaded[0])
    yield found
    found.remove()
    tokencomp.unpatch(loaded[0])


def logits_of(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    model.model.rope_deltas = None
    with torch.no_grad():
        return model(**inputs, logits_to_keep=1).logits[:, -1]


@pytest.mark.parametrize("ratio", [None, 0.5])
def test_a_session_equals_one_prompt(
    loaded: tuple[Any, Any], clip: Any, record: Record, ratio: float | None
) -> None:
    """Chunks, text, an image, a question that stays and one that does not."""
    model, processor = loaded
    frames, question, answer = clip
    if ratio is not None:
        tokencomp.patch(model, ratio, **KCENTER)
    session = tokencomp.Session(model, processor)
    for i in range(0, 8, 2):
        session.append(frames[i : i + 2], seconds=0.5)
    assert session.ask(question) == answer
    forgotten = len(record.calls)
    first = record.logits[4]
    assert session.ask(question) == answer  # the same words, and the same numbers
    assert torch.equal(record.logits[forgotten], first)
    del record.calls[4:], record.logits[4:]
    limit = (
        {} if ratio is None else {"max_new_tokens": len(processor.tokenizer(answer)["input_ids"])}
    )
    assert session.ask(question, keep=True, **limit) == answer  # once as long as is allowed
    session.say("And this?").append(frames[0])
    assert session.ask("What is there?", max_new_tokens=1)
    inputs, last = record.one_prompt(), record.logits[-1]
    text = processor.tokenizer.decode(inputs["input_ids"][0])
    assert text.count("<|im_start|>user") == 2 and text.count("<|im_start|>assistant") == 2
    assert f"{question}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n" in text
    assert [s for s in ("<0.2 seconds>", "<1.2 seconds>", "<3.2 seconds>") if s not in text] == []
    assert float((last - logits_of(model, inputs)).abs().max()) < 2e-5
    asked = len(processor.tokenizer("What is there?")["input_ids"]) + len(session._turns.answer)
    assert session.tokens == inputs["input_ids"].shape[1] - asked
    session.close()


def test_an_odd_number_of_frames_is_what_the_processor_makes_of_it(
    loaded: tuple[Any, Any], clip: Any, record: Record
) -> None:
    """The last frame stands for the missing one, at its own time, and a warning says so.

    The processor itself refuses a single frame.
    """
    model, processor = loaded
    frames = [np.asarray(frame) for frame in clip[0][:3]]
    session = tokencomp.Session(model, processor)
    with pytest.warns(FrameChoiceWarning, match="last of 3 frames is shown 2 times"):
        session.append(frames, seconds=[0.0, 1.0, 2.0])
    with pytest.warns(FrameChoiceWarning, match="last of 1 frames is shown 2 times"):
        session.append(frames[:1], seconds=[3.0])
    with warnings.catch_warnings():
        warnings.simplefilter("error", FrameChoiceWarning)
        session.append(frames[:2], seconds=[4.0, 5.0])
    means, shown = ([0.5, 2.0], [3.0], [4.5]), ([0, 1, 2, 2], [0, 0], [0, 1])
    for call, times, pictures in zip(record.calls, means, shown, strict=True):
        text = processor.tokenizer.decode(call["input_ids"][0])
        assert re.findall(r"<([\d.]+) seconds>", text) == [f"{t:.1f}" for t in times]
        grid = call["video_grid_thw"][0]
        pairs = np.stack([frames[i] for i in pictures])
        whole = processor.video_processor(pairs, do_sample_frames=False, return_tensors="pt")
        assert torch.equal(grid, whole["video_grid_thw"][0]) and int(grid[0]) == len(times)
        assert torch.equal(call["pixel_values_videos"], whole["pixel_values_videos"])


def test_vila(clip: Any) -> None:
    """Ids and logits are those of its processor's one prompt; tiles would depend on the others."""
    model, processor = zoo.load("tiny-vila")
    frames, question, _ = clip
    whole = build_inputs(processor, [[frames[0], frames]], [question])
    record = Record(model)
    with tokencomp.patch(model, 0.5, **KCENTER), torch.no_grad():
        session = tokencomp.Session(model, processor).append(frames[0]).append(frames)
        session.ask(question)
        parts, logits = [call["input_ids"] for call in record.calls], record.logits[:3]
        record.remove()
        assert torch.equal(torch.cat(parts[:3], 1), whole["input_ids"])
        last = model(**whole, logits_to_keep=1).logits[:, -1]
        assert float((last - logits[-1]).abs().max()) < 2e-5
        processor.config.image_aspect_ratio = "dynamic"
        with pytest.raises(MediaError, match="the only image of a prompt into tiles"):
            session.append(frames[1])


def test_a_session_leaves_no_trace(loaded: tuple[Any, Any], clip: Any, record: Record) -> None:
    """Of the cache after a question, every tensor is what it was; of the model, everything."""
    model, processor = loaded
    with tokencomp.Session(model, processor) as session:
        session.append(clip[0][:4], seconds=0.5)
        before = [(layer.keys.clone(), layer.values.clone()) for layer in session.cache.layers]
        rows, deltas = session.rows, model.model.rope_deltas
        session.ask(clip[1])
        for (keys, values), layer in zip(before, session.cache.layers, strict=True):
            assert torch.equal(layer.keys, keys) and torch.equal(layer.values, values)
        assert session.rows == rows and model.model.rope_deltas is deltas
    record.remove()
    assert not model._forward_pre_hooks and not model.model.language_model._forward_pre_hooks


def test_an_interrupted_question_leaves_no_trace(loaded: Any, clip: Any, record: Record) -> None:
    """Ctrl-C during an answer that would stay: later turns and evictions are as without it."""
    model, processor = loaded

    def interrupt(module: Any, args: Any) -> None:
        if len(record.calls) == 3:  # the frames, the question, the first token of the answer
            raise KeyboardInterrupt

    found = []
    for interrupted in (True, False):
        record.calls.clear()
        with tokencomp.Session(model, processor, budget=190) as session:
            session.append(clip[0][:2], seconds=0.5)
            if interrupted:
                hook = model.register_forward_pre_hook(interrupt)
                with pytest.raises(KeyboardInterrupt):
                    session.ask(clip[1], keep=True)
                hook.remove()
            session.append(clip[0][2:4], seconds=0.5).append(clip[0][4:6], seconds=0.5)
            assert session.rows == 190 < session.tokens
            found.append([layer.keys.clone() for layer in session.cache.layers])
    assert all(map(torch.equal, *found))


def test_rows_stay_in_the_budget(loaded: tuple[Any, Any], clip: Any, record: Record) -> None:
    model, processor = loaded
    tokencomp.patch(model, 0.5, **KCENTER)
    session = tokencomp.Session(model, processor, budget=100, policy="redundant")
    for i in range(12):
        session.append(clip[0][i % 4 * 2 :][:2], seconds=0.5)
        assert session.rows <= 100
    assert session.tokens > 800 and session.rows == 100
    session.ask("word " * 200, max_new_tokens=1)  # more rows than the budget, for a while
    assert session.rows == 100
    session.ask(clip[1], keep=True)
    assert session.rows == 100
    session.close()


def test_a_refused_first_part_leaves_the_system_text(loaded: Any, clip: Any) -> None:
    tokens = []
    for refused in (True, False):
        with tokencomp.Session(*loaded, budget=160) as session:
            if refused:
                with pytest.raises(SessionError, match="a chunk of"):
                    session.append(clip[0], seconds=0.5)
            tokens.append(session.append(clip[0][0]).tokens)
    assert tokens[0] == tokens[1]


def test_bad_options(loaded: tuple[Any, Any], clip: Any) -> None:
    model, processor = loaded
    for budget in (0, -3, 1.5, True, "many"):
        with pytest.raises(OptionError, match="whole number of cache rows above 0"):
            tokencomp.Session(model, processor, budget=budget)
    with pytest.raises(OptionError, match=r"'oldest', 'redundant'"):
        tokencomp.Session(model, processor, policy="newest")
    with pytest.raises(SessionError, match=r"budget=3\. Allowed are 3 rows"):
        tokencomp.Session(model, processor, budget=3)
    template, processor.chat_template = processor.chat_template, None
    with pytest.raises(OptionError, match="no chat template"):
        tokencomp.Session(model, processor)
    processor.chat_template = "{% for m in messages %}{{ loop.index }}{% endfor %}"
    with pytest.raises(OptionError, match="cannot be cut into turns"):
        tokencomp.Session(model, processor)
    processor.chat_template = template


def test_bad_input_loses_nothing(loaded: tuple[Any, Any], clip: Any, record: Record) -> None:
    """Every refusal says what is allowed, and the conversation goes on as if it had not been."""
    model, processor = loaded
    frames, question, _ = clip
    with tokencomp.Session(model, processor, budget=160) as session:
        session.append(frames[:2], seconds=[0.0, 0.5])
        rows, tokens = session.rows, session.tokens
        bad: list[tuple[type[Exception], str, Any, dict[str, Any]]] = [
            (SessionError, "a chunk of .* tokens", frames, {"seconds": 0.5}),
            (FrameOrderError, "0.5 s", frames[:2], {"seconds": [0.5, 1.0]}),
            (FrameOrderError, "2 s follows one of 3 s", frames[:2], {"seconds": [3.0, 2.0]}),
            (OptionError, "one finite time per frame", frames[:2], {"seconds": [3.0]}),
            (OptionError, "one finite time per frame", frames[:2], {"seconds": "now"}),
            (OptionError, "a distance above 0", frames[:2], {"seconds": -1}),
            (OptionError, "reads when each frame was shown", frames[:2], {}),
            (OptionError, "times belong to frames", frames[0], {"seconds": 1.0}),
            (MediaError, "0 frames", [], {"seconds": 0.5}),
            (MediaError, "of shapes", [frames[0], frames[1].resize((28, 28))], {"seconds": 0.5}),
            (MediaError, "load_media", "clip.mp4", {}),
            (MediaError, "array", np.zeros((4, 4)), {}),
        ]
        for error, match, media, options in bad:
            with pytest.raises(error, match=match):
                session.append(media, **options)
            assert (session.rows, session.tokens) == (rows, tokens)
        with pytest.raises(SessionError, match="tokens of text"):
            session.say("word " * 200)
        with pytest.raises(SessionError, match="tokens of text"):
            session.ask(question, keep=True, max_new_tokens=200)
        with pytest.raises(OptionError, match="not empty"):
            session.ask("")
        for write in (session.say, session.ask):
            with pytest.raises(OptionError, match=r"<.image_pad.>', which stands for media"):
                write("a <|image_pad|> b")
        with pytest.raises(OptionError, match="max_new_tokens=0"):
            session.ask(question, max_new_tokens=0)
        assert (session.rows, session.tokens) == (rows, tokens)
        session.append(Video(frames[2:4], fps=2.0, indices=[2, 3]))
        del record.calls[:1]
        assert session.ask(question, max_new_tokens=1)
    with pytest.raises(SessionError, match="closed"):
        session.append(frames[0])


def test_a_second_session_of_a_patched_model(loaded: Any, clip: Any, record: Record) -> None:
    model, processor = loaded
    first = tokencomp.Session(model, processor)
    second = tokencomp.Session(model, processor)  # a model without a patch serves many
    tokencomp.patch(model, 0.5, **KCENTER)
    with pytest.raises(SessionError, match="other session of it is open"):
        second.append(clip[0][0])
    with pytest.raises(SessionError, match="Close the other one"):
        tokencomp.Session(model, processor)
    second.close()
    first.append(clip[0][0])
    first.close()
    tokencomp.Session(model, processor).close()


@pytest.mark.parametrize(
    "options", [{"reducer": name} for name in ("condiv", "fastv", "cdpruner", "prune", "dart")]
)
def test_reducers_that_read_questions(
    loaded: Any, clip: Any, record: Record, options: dict[str, Any]
) -> None:
    model, processor = loaded
    tokencomp.patch(model, 0.5, **options)
    with tokencomp.Session(model, processor) as session:
        with pytest.raises(OptionError, match="does not know the questions yet"):
            session.append(clip[0][:2], seconds=0.5)
        assert session.tokens == 0


def test_a_budget_of_a_whole_prompt(loaded: Any, clip: Any, record: Record) -> None:
    """The rows of earlier images are in the cache when a later one comes."""
    model, processor = loaded
    handle = tokencomp.patch(model, reducer="kcenter", budget={"prompt": 40})
    with tokencomp.Session(model, processor) as session:
        session.say("Look.")
        tokens = session.tokens
        with pytest.raises(OptionError, match="depend on the others"):
            session.append(clip[0][0])
        assert session.tokens == tokens
        handle.set(budget=8)
        assert session.append(clip[0][0]).tokens > tokens


def test_compact_positions(loaded: Any, clip: Any) -> None:
    model, processor = zoo.load("tiny-llava-onevision")
    with (
        tokencomp.patch(model, 0.5, positions="compact", **KCENTER),
        tokencomp.Session(model, processor) as session,
        pytest.raises(OptionError, match='positions="compact"'),
    ):
        session.append(clip[0][0])


def test_models_that_keep_states_need_no_budget() -> None:
    model, processor = zoo.load("tiny-qwen3-5")
    with pytest.raises(UnsupportedModelError, match="budget=None"):
        tokencomp.Session(model, processor)
    assert tokencomp.Session(model, processor, budget=None).rows == 0
