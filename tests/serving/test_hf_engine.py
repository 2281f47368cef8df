"""The engine's thread when the model fails: who is answered what, and what the next client gets."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import Mock

import pytest

pytest.importorskip("pydantic")
import torch
from starlette.testclient import TestClient
from support.serving import hf_reference, http
from support.serving.prompts import read

from tokencomp.errors import ScoreError
from tokencomp.serving.hf import engine as module
from tokencomp.serving.hf.app import build_app
from tokencomp.serving.hf.engine import Engine
from tokencomp.serving.hf.metrics import Metrics
from tokencomp.serving.hf.queue import Job
from tokencomp.serving.hf.text import AnswerText
from tokencomp.serving.limits import Limits, RequestError
from tokencomp.serving.spec import ServerOptions

URLS = [http.image_url(seed, 112, 112) for seed in range(6)]
GUILTY = 4  # the number of the image that the model cannot process


@pytest.fixture
def engine(tiny_folder: Any) -> Iterator[Engine]:
    options = ServerOptions.parse({"ratio": 0.5}, engine="hf")
    result = Engine(*hf_reference.load(tiny_folder("qwen2_vl")), options, Metrics())
    yield result
    result.close()


def ask(engine: Engine, urls: list[str], most: Any = (6,) * 6, **fields: Any) -> list[Any]:
    """Ask once per image, all at once; return "error" and why, or finish, text and tokens.

    `most` are the largest numbers of tokens of the answers.
    """

    async def run() -> list[Any]:
        loop, jobs = asyncio.get_running_loop(), []
        for url, tokens in zip(urls, most, strict=False):
            body = {"messages": http.messages("What?", url), "temperature": 0}
            prompt = read({**body, **fields}, engine.text, engine.options)
            jobs.append(Job(prompt, loop, tokens, AnswerText(engine.tokenizer)))
        with engine._wake:  # the engine sees all of them at once
            for job in jobs:
                engine.submit(job)
        return [await asyncio.wait_for(last(job), 60) for job in jobs]

    async def last(job: Job) -> Any:
        text = ""
        while True:
            _, kind, value = await job.events.get()
            if kind == "error":
                return kind, value
            if kind == "end":
                return value, text, job.usage.completion
            text += value.text if kind == "text" else ""

    return asyncio.run(run())


def failing(engine: Engine, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> list[int]:
    """Let the model fail on batches with the guilty image; return the sizes of all batches."""
    guilty = read({"messages": http.messages("What?", URLS[GUILTY])}).images[0].tobytes()
    build, sizes = module.build_inputs, []

    def build_inputs(model: Any, processor: Any, prompts: list[Any]) -> Any:
        sizes.append(len(prompts))
        if any(image.tobytes() == guilty for prompt in prompts for image in prompt.images):
            raise error
        return build(model, processor, prompts)

    monkeypatch.setattr(module, "build_inputs", build_inputs)
    return sizes


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def idle(engine: Engine) -> None:
    """Wait until the engine has ended the last batch: it waits on its condition."""
    wait_until(lambda: bool(engine._wake._waiters))  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [(torch.OutOfMemoryError("no"), 503, "out of memory"), (OSError("/secret"), 500, "OSError")],
)
def test_only_the_request_that_the_model_cannot_run_fails(
    engine: Engine, error: BaseException, status: int, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = [ask(engine, [url])[0] for url in URLS]
    emptied: list[int] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(1))
    sizes = failing(engine, monkeypatch, error)
    together = ask(engine, URLS)
    assert sizes[0] == len(URLS)  # they shared a batch
    for number, answer in enumerate(together):
        if number != GUILTY:
            assert answer == alone[number] and answer[0] == "length"
    failure = together[GUILTY][1]
    assert isinstance(failure, RequestError) and failure.status == status and words in str(failure)
    assert bool(emptied) == (status == 503) and engine.healthy


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("no"), ScoreError("NaN"), RuntimeError("CUDA error")]
)
def test_requests_that_fail_alone_do_not_make_the_server_unwell(
    engine: Engine, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(engine, monkeypatch, error)
    for _ in range(12):
        assert ask(engine, [URLS[GUILTY]])[0][0] == "error"
    idle(engine)
    assert engine.healthy


def test_a_model_that_answers_nothing_is_unwell_until_it_recovers(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It recovers without a request, as none arrives behind a readiness probe."""
    client = TestClient(build_app(engine, "tiny", Limits()))
    health: Callable[[], int] = lambda: client.get("/health").status_code  # noqa: E731
    monkeypatch.setattr(module, "PROBE_SECONDS", 0.05)
    assert health() == 200
    with monkeypatch.context() as broken:
        broken.setattr(engine.model, "generate", Mock(side_effect=RuntimeError("CUDA error")))
        assert ask(engine, [URLS[0]])[0][1].status == 500
        wait_until(lambda: health() == 503)
    wait_until(lambda: health() == 200)


def test_an_answer_makes_a_server_well(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the next probe, which waits until no request waits."""
    monkeypatch.setattr(module, "PROBE_SECONDS", 1000.0)
    with monkeypatch.context() as broken:
        broken.setattr(engine.model, "generate", Mock(side_effect=RuntimeError("CUDA error")))
        assert ask(engine, [URLS[0]])[0][1].status == 500
        idle(engine)
        assert not engine.healthy
    assert ask(engine, [URLS[0]])[0][0] == "length"
    idle(engine)
    assert engine.healthy


def test_a_batch_has_as_many_pixels_as_fit(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four pictures of 112 × 112 pixels, of which two fit."""
    monkeypatch.setattr(engine.waiting, "max_batch_pixels", 2 * 112 * 112)
    sizes = failing(engine, monkeypatch, OSError())
    assert {answer[0] for answer in ask(engine, URLS[:4])} == {"length"} and sizes == [2, 2]


def test_usage_counts_every_image(engine: Engine) -> None:
    """16 visual tokens of each of two, of which a ratio of 0.5 keeps 8."""
    body = {"model": "tiny", "messages": http.messages("What?", *URLS[:2]), "max_tokens": 1}
    client = TestClient(build_app(engine, "tiny", Limits()))
    usage = client.post("/v1/chat/completions", json=body).json()["usage"]["tokencomp"]
    assert (usage["visual_tokens_before"], usage["visual_tokens_after"]) == (32, 16)


def test_an_error_that_ends_the_thread_is_answered(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threading, "excepthook", lambda arguments: None)
    monkeypatch.setattr(engine.waiting, "max_batch", 2)
    failing(engine, monkeypatch, SystemExit(1))
    answers = ask(engine, [URLS[GUILTY], *URLS[:3]])
    statuses = [answer[1].status for answer in answers if answer[0] == "error"]
    assert statuses == [500, 500, 503, 503]
    assert not engine.healthy
    with pytest.raises(RequestError) as error:
        ask(engine, [URLS[0]])
    assert error.value.status == 503


def test_features_that_are_not_finite_are_no_fault_of_the_request(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model overflows on one image, as some vision towers do in float16."""
    visual = engine.model.model.visual

    def overflow(_: Any, inputs: Any, kwargs: Any, output: Any) -> Any:
        if engine.model.overflows:
            output.pooler_output[:1] = float("nan")
        return output

    hook = visual.register_forward_hook(overflow, with_kwargs=True)
    try:
        engine.model.overflows = False
        assert ask(engine, URLS[:1])[0][0] == "length"
        engine.model.overflows = True
        (answer,) = ask(engine, URLS[:1])
    finally:
        hook.remove()
        del engine.model.overflows
    assert answer[0] == "error" and answer[1].status == 500
    assert "NaN or infinite" in str(answer[1]) and "bfloat16" in str(answer[1])


def test_an_answer_ends_at_its_length_and_that_of_the_model(engine: Engine) -> None:
    """Whatever the others in its batch may have."""
    answers = ask(engine, URLS[:3], (2, 6, 4), ignore_eos=True)
    assert [a[::2] for a in answers] == [("length", 2), ("length", 6), ("length", 4)]
    prompt = read({"messages": http.messages("What?", URLS[0])}, engine.text)
    inputs = module.build_inputs(engine.model, engine.processor, [prompt])
    engine.max_model_len = inputs["input_ids"].shape[1] + 4
    assert [a[::2] for a in ask(engine, URLS[:2], ignore_eos=True)] == [("length", 4)] * 2


def test_a_seed_does_not_reach_the_next_request(engine: Engine) -> None:
    sampled = {"temperature": 2, "ignore_eos": True}
    seeded, free = [], []
    for _ in range(3):
        seeded.append(ask(engine, URLS[:1], **sampled, seed=1)[0])
        free.append(ask(engine, URLS[:1], **sampled)[0])
    assert len(set(seeded)) == 1 and len(set(free)) == 3


BOTH = {"ratio": 0.75, "tower_ratio": 0.5}


@pytest.mark.parametrize(
    ("default", "asked", "tower", "merge"),
    [
        (BOTH, None, 0.5, "auto"), (BOTH, {"tower_ratio": 0.25}, 0.75, "auto"),
        (BOTH, {"ratio": 0.4}, 0.6, None),  # all of it in the tower
        (BOTH, {"tower_ratio": 0}, 1, "auto"), ({"ratio": 0.5}, {"merge": True}, 1, True),
        ({"ratio": 0.5}, {"merge": False}, 1, False),
        ({"ratio": 0.5}, {"reducer": "uniform"}, 1, False),  # only the default merges by itself
        ({"ratio": 0.5}, {"reducer": "bipartite"}, 1, False),
    ],
)  # fmt: skip
def test_a_request_changes_the_default(
    engine: Engine, default: Any, asked: Any, tower: float, merge: Any
) -> None:
    """Whatever the request before it set."""
    options = ServerOptions.parse(default, engine="hf")
    for before in ({"merge": True, "tower_ratio": 0.1, "ratio": 0.2}, {"reducer": "uniform"}):
        for request in (before, asked):
            with engine._compressed(options.resolve(request, engine="hf")):
                plan = engine._handle.plan
        assert (plan.tower.fraction if plan.tower else 1) == pytest.approx(tower)
        assert [stage.merge for stage in plan.stages] == ([] if merge is None else [merge])
