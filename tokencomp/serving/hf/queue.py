"""Answers to requests, while they wait for the engine and while they are generated."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from tokencomp.serving.hf.fields import SAMPLING
from tokencomp.serving.hf.grammar import Grammar
from tokencomp.serving.hf.prompt import ChatPrompt
from tokencomp.serving.hf.text import AnswerText
from tokencomp.serving.limits import RequestError
from tokencomp.serving.saved import Saved

Event = tuple[int, str, Any]
"""Index of the answer, kind, and value: `("start", Usage)`, `("text", Piece)`, `("error",
exception)`, or "end" with "stop", "length" or "abort"."""


@dataclass
class Usage:
    """Token counts of one request."""

    prompt: int  # tokens that entered the decoder: text and kept visual tokens
    saved: Saved
    completion: int = 0

    def as_dict(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "tokencomp": self.saved.as_usage(),
        }


@dataclass
class Piece:
    """Text of an answer that is final, and the log-probabilities of its tokens, if asked for."""

    text: str
    logprobs: list[dict[str, Any]]


@dataclass(eq=False)  # identity instead of equality, as prompts contain arrays
class Job:
    """One answer to a request; the engine's thread writes `events` for the event loop."""

    prompt: ChatPrompt
    loop: asyncio.AbstractEventLoop
    max_tokens: int
    text: AnswerText
    events: asyncio.Queue[Event] = field(default_factory=asyncio.Queue)  # of all answers
    index: int = 0
    grammar: Grammar | None = None
    arrived: float = field(default_factory=time.monotonic)
    first: float = 0.0  # time of the first token
    cancelled: bool = False  # the client has disconnected
    done: bool = False  # the last event was sent
    usage: Usage | None = None  # once the prefill has started
    _logprobs: list[dict[str, Any]] = field(default_factory=list)  # not sent yet

    @property
    def group(self) -> tuple[Any, ...]:
        """Jobs of equal groups share a batch; those with a seed are alone in theirs."""
        request = self.prompt.request
        # A seed sets the generators of the whole batch.
        alone = self.prompt.alone or (self.seed is not None and request.temperature != 0)
        sampling = [getattr(request, name) for name in SAMPLING]
        return self.prompt.spec, *sampling, id(self) if alone else None

    @property
    def seed(self) -> int | None:
        """Seed of this answer; the answers to one request differ."""
        seed = self.prompt.request.seed
        return None if seed is None else seed + self.index

    def send(self, kind: str, value: Any) -> None:
        """Send an event to the event loop. Thread-safe."""
        self.done = self.done or kind in ("end", "error")
        self.loop.call_soon_threadsafe(self.events.put_nowait, (self.index, kind, value))

    def add(self, token: int, is_end: bool, logprob: dict[str, Any] | None = None) -> None:
        """Add one generated token, send text that is final, and end the job where it ends."""
        if self.done:
            return
        assert self.usage is not None  # the prefill has run
        self.usage.completion += 1
        stopped, new = is_end and not self.prompt.request.ignore_eos, ""
        if not stopped:
            new = self.text.add(token)
            if logprob is not None:
                self._logprobs.append(logprob)
            if self.grammar is not None and (problem := self.grammar.accept(token)):
                error = f"the answer cannot go on in its form: {problem}"
                self.send("error", RequestError(error))
                return
            stopped = self.text.stopped or (self.grammar is not None and self.grammar.ended)
        # The end token counts as generated, as in vLLM.
        final = stopped or self.usage.completion >= self.max_tokens
        if final:
            new += self.text.finish()
        if new or (final and self._logprobs):
            self.send("text", Piece(new, self._logprobs))
            self._logprobs = []
        if final:
            self.send("end", "stop" if stopped else "length")


@dataclass
class Waiting:
    """The queue of the engine, oldest first; changes require the engine's lock."""

    max_batch: int = 8
    max_batch_pixels: int = 100_000_000  # processors need about 24 bytes per pixel
    max_waiting: int = 256  # above, new requests get 503
    jobs: deque[Job] = field(default_factory=deque)

    def __len__(self) -> int:
        return len(self.jobs)

    def check_room(self, count: int = 1) -> None:
        """Raise `RequestError` (503) when full with `count` more requests."""
        if sum(not job.cancelled for job in list(self.jobs)) + count > self.max_waiting:
            raise RequestError("the server is busy; try again later.", 503)

    def take(self) -> list[Job]:
        """Remove and return the oldest request and those with equal options, up to the batch size.

        Requests of disconnected clients are dropped.
        """
        waiting = [job for job in self.jobs if not job.cancelled]
        batch: list[Job] = []
        pixels = 0
        # The oldest request decides the group, so that none waits for ever.
        for job in (j for j in waiting if j.group == waiting[0].group):
            pixels += job.prompt.pixels
            if batch and (len(batch) == self.max_batch or pixels > self.max_batch_pixels):
                break
            batch.append(job)
        self.jobs = deque(j for j in waiting if j not in batch)
        return batch
