"""Answers to a request in the form of OpenAI's API, whole or as a stream of events."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import replace
from typing import Any

from tokencomp.serving.hf.prompt import ChatPrompt
from tokencomp.serving.hf.queue import Event, Job, Piece, Usage
from tokencomp.serving.hf.text import AnswerText, Calls
from tokencomp.serving.saved import Saved

DEFAULT_TOKENS = 256


class Completion:
    """The jobs of one request, and a queue of their events; `identity` is in every response."""

    def __init__(self, prompt: ChatPrompt, tokenizer: Any, identity: dict[str, Any]) -> None:
        self.request, self.identity = prompt.request, identity
        self.events: asyncio.Queue[Event] = asyncio.Queue()
        request, loop = self.request, asyncio.get_running_loop()
        tokens = request.max_completion_tokens or request.max_tokens or DEFAULT_TOKENS
        stops, form = request.stops, prompt.calls
        # One call at most: the answer ends with the mark after it.
        if form is not None and request.parallel_tool_calls is False:
            stops = [*stops, form.end]
        names = [tool.function.name for tool in request.offered]
        self.calls = [Calls(form, names, request.must_call) for _ in prompt.grammars]
        self.jobs = [
            Job(prompt, loop, tokens, AnswerText(tokenizer, stops), self.events, index, grammar)
            for index, grammar in enumerate(prompt.grammars)
        ]

    def cancel(self) -> None:
        """Cancel all jobs: the client has disconnected, or needs no more."""
        for job in self.jobs:
            job.cancelled = True

    @property
    def usage(self) -> Usage | None:
        """Token counts of all answers; the prompt counts once."""
        every = [job.usage for job in self.jobs if job.usage is not None]
        if not every:
            return None
        return replace(every[0], completion=sum(usage.completion for usage in every))

    def __str__(self) -> str:
        """Return setting and token counts in the form of the access log."""
        usage = self.usage
        if usage is None:
            return f"{Saved.by(self.jobs[0].prompt.spec, {})} tokens=none"
        return f"{usage.saved} prompt={usage.prompt} generated={usage.completion}"

    async def whole(self, next_event: Callable[[], Awaitable[Event]]) -> dict[str, Any]:
        """Collect all events; return the body of the response. Raises the error of a job."""
        pieces: list[list[Piece]] = [[] for _ in self.jobs]
        finish: dict[int, str] = {}
        while len(finish) < len(self.jobs):
            index, kind, value = await next_event()
            if kind == "error":
                raise value
            if kind == "end":
                finish[index] = value
            elif kind == "text":
                pieces[index].append(value)
        choices = []
        for index, parts in enumerate(pieces):
            content, calls = self.calls[index].add("".join(part.text for part in parts), final=True)
            message: dict[str, Any] = {"role": "assistant", "content": content}
            if calls:
                message.update(content=content or None, tool_calls=calls)
            ended = self._reason(index, finish[index])
            choice = self._choice(index, ended, [e for p in parts for e in p.logprobs])
            choices.append({**choice, "message": message})
        body = {**self.identity, "object": "chat.completion", "choices": choices}
        return {**body, "usage": self.usage.as_dict() if self.usage else None}

    async def stream(self) -> AsyncIterator[str]:
        """Yield server-sent events; the jobs are cancelled if the client disconnects."""
        base = {**self.identity, "object": "chat.completion.chunk"}

        def grown(index: int, text: str, entries: Any, final: bool = False) -> Iterator[str]:
            known = len(self.calls[index].found)
            content, calls = self.calls[index].add(text, final)
            if content or entries:
                yield chunk(index, {"content": content}, entries=entries)
            for i, call in enumerate(calls, known):
                yield chunk(index, {"tool_calls": [{"index": i, **call}]})

        def chunk(index: int, delta: dict[str, Any], finish: Any = None, entries: Any = ()) -> str:
            choice = {**self._choice(index, finish, list(entries)), "delta": delta}
            return _event({**base, "choices": [choice]})

        try:
            for job in self.jobs:
                yield chunk(job.index, {"role": "assistant", "content": ""})
            running = len(self.jobs)
            while running:
                index, kind, value = await self.events.get()
                if kind == "error":
                    yield _event(value.body())
                    break
                if kind == "end":
                    running -= 1
                    for event in grown(index, "", (), final=True):
                        yield event
                    yield chunk(index, {}, self._reason(index, value))
                elif kind == "text":
                    for event in grown(index, value.text, value.logprobs):
                        yield event
            options = self.request.stream_options
            if options is not None and options.include_usage and self.usage is not None:
                yield _event({**base, "choices": [], "usage": self.usage.as_dict()})
            yield "data: [DONE]\n\n"
        finally:
            self.cancel()  # the client has disconnected, or the answer is complete

    def _reason(self, index: int, finish: str) -> str:
        return "tool_calls" if finish == "stop" and self.calls[index].found else finish

    def _choice(self, index: int, finish: str | None, entries: list[Any]) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": index, "finish_reason": finish}
        if self.request.logprobs:
            choice["logprobs"] = {"content": entries, "refusal": None}
        return choice


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value)}\n\n"
