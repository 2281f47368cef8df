"""Memory for the media of all requests of a server: decoders, and decoded media that wait."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import anyio
import pytest

pytest.importorskip("starlette")
import torch
from support.serving import doors
from support.serving.doors import REACHED, part, through, user
from support.serving.files import image

from tokencomp.serving.hf import app as server
from tokencomp.serving.hf.app import build_app
from tokencomp.serving.limits import Limits, RequestError
from tokencomp.serving.room import DECODING, MediaRoom
from tokencomp.serving.saved import Saved
from tokencomp.serving.vllm import middleware

SIDE = 20  # pixels of a picture
DECODED = {"hf": 3 * SIDE**2, "vllm": 12 * SIDE**2}  # bytes: of 8 bits, and as float32
SEEN = user(part(image(SIDE)))


class Engine:
    """Either server before an engine that decodes, begins and ends when the test says so."""

    def __init__(self, kind: str, monkeypatch: Any) -> None:
        self.kind, self.decoding, self.waiting = kind, 0, 0
        self.decode, self.begin, self.end = (asyncio.Event() for _ in range(3))
        room = MediaRoom(2 * DECODED[kind])
        for module in (server, middleware):
            monkeypatch.setattr(module, "MediaRoom", lambda: room)
        self.room = room
        if kind == "hf":
            load = server.load
            monkeypatch.setattr(server, "load", lambda *given: self._load(load, *given))
            loop = asyncio.get_running_loop()
            self.loop = loop
            self.app: Any = build_app(doors.engine(submit=self._submit), "tiny", Limits())
            return
        client = SimpleNamespace(shutdown=None, generate=self._generate, errored=False)
        self.client, self.app = client, doors.vllm(app=self._vllm)
        self.app._watch(client)

    def _load(self, load: Any, *given: Any) -> None:
        self.decoding += 1
        asyncio.run_coroutine_threadsafe(self.decode.wait(), self.loop).result(20)
        self.decoding -= 1
        load(*given)

    def _submit(self, job: Any) -> None:
        self.waiting += 1

        async def run() -> None:
            await self.begin.wait()
            self.waiting -= 1
            job.send("start", None)
            await self.end.wait()
            job.send("error", RequestError("reached", REACHED))

        self.task = asyncio.ensure_future(run())

    async def _vllm(self, scope: Any, receive: Any, send: Any) -> None:
        self.decoding += 1
        await receive()
        await self.decode.wait()
        self.decoding -= 1
        media = {"image": [{"pixel_values": SimpleNamespace(data=torch.zeros(3 * SIDE**2))}, None]}
        saved = Saved("kcenter", {"ratio": 0.5}, {"image": (4, 2)})
        hashes = {"image": ["first", "cached"]}
        prompt = {"tokencomp": saved, "mm_kwargs": media, "mm_hashes": hashes}
        sampling = SimpleNamespace(extra_args={})
        async for _ in self.client.generate(prompt, sampling):
            await self.end.wait()
            raise RequestError("reached", REACHED)

    async def _generate(self, prompt: Any, sampling: Any) -> Any:
        self.waiting += 1
        await self.begin.wait()
        self.waiting -= 1
        yield "a token"


async def until(condition: Any) -> None:
    with anyio.fail_after(20):
        while not condition():
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("kind", ["hf", "vllm"])
def test_few_requests_decode_at_one_time_and_few_media_wait(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many requests with large media at one time, which together fill the memory.

    Four decode; of those, the media of two fill the memory until the engine has begun.
    """
    answers: list[int] = []

    async def run() -> None:
        engine = Engine(kind, monkeypatch)

        async def ask() -> None:
            answers.append((await through(engine.app, SEEN)).status)

        async with anyio.create_task_group() as group:
            for _ in range(DECODING + 2):
                group.start_soon(ask)
            await until(lambda: engine.decoding == DECODING)
            await asyncio.sleep(0.1)
            assert engine.decoding == DECODING and not answers
            engine.decode.set()
            # On vLLM those that decode when the memory is full come on top.
            held = {"hf": 2, "vllm": DECODING}[kind]
            await until(lambda: engine.waiting + len(answers) == DECODING + 2)
            assert engine.waiting == held and answers == [503] * (DECODING + 2 - held)
            await ask()
            assert answers[-1] == 503 and engine.room.used == held * DECODED[kind]
            engine.begin.set()
            await until(lambda: engine.room.used == 0)  # although no answer has ended
            assert REACHED not in answers
            engine.end.set()
        assert answers.count(REACHED) == held
        assert engine.room.used == 0
        assert (await through(engine.app, SEEN)).status == REACHED
        assert (await through(engine.app, user("a text"))).status == REACHED

    anyio.run(run)


def test_what_is_held_is_released_once() -> None:
    room = MediaRoom(10)
    first, second = room.hold(6), room.hold(6)
    with pytest.raises(RequestError, match="busy"):
        room.check()
    first()
    first()
    assert room.used == 6
    room.check(4)
    with pytest.raises(RequestError, match="busy"):
        room.check(5)
    second()
    room.check(11)  # larger than the memory, and alone
