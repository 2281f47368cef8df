"""A request on its way through the engine, and the text that has come out so far."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import Any, Literal

from tokencomp.serving.hf.schema import Prompt

Finish = Literal["stop", "length", "abort"]


@dataclass
class Usage:
    """Token counts of one request.

    Attributes
    ----------
    prompt
        Tokens that entered the decoder: text, and what was left of the media.
    visual_before, visual_after
        Visual tokens uncompressed, and seen by a decoder layer on average.
    """

    prompt: int
    completion: int = 0
    visual_before: int = 0
    visual_after: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        ratio = 1 - self.visual_after / self.visual_before if self.visual_before else 0.0
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "tokencomp": {
                "visual_tokens_before": self.visual_before,
                "visual_tokens_after": self.visual_after,
                "ratio": ratio,
            },
        }


@dataclass(eq=False)  # a job is itself: prompts hold arrays, which do not compare
class Job:
    """One request; the engine thread writes, the event loop reads `events`.

    Events are ("start", Usage), ("text", str), ("end", Finish) and ("error", exception).
    """

    prompt: Prompt
    loop: asyncio.AbstractEventLoop
    max_tokens: int
    events: asyncio.Queue = field(default_factory=asyncio.Queue)
    arrived: float = field(default_factory=time.monotonic)
    cancelled: bool = False
    done: bool = False
    usage: Usage | None = None
    _ids: list[int] = field(default_factory=list)
    _told: int = 0

    @property
    def group(self) -> tuple[Any, ...]:
        """Requests with equal groups can share a batch."""
        r = self.prompt.request
        alone = id(self) if r.seed is not None and r.temperature != 0 else None
        return self.prompt.spec, r.temperature, r.top_p, alone

    def send(self, kind: str, value: Any) -> None:
        """Hand an event to the event loop; callable from any thread."""
        self.done = self.done or kind in ("end", "error")
        self.loop.call_soon_threadsafe(self.events.put_nowait, (kind, value))

    def add(self, token: int, tokenizer: Any, is_end: bool) -> None:
        """Take one generated token; finishes the job at its end token, stop text or length."""
        if self.done:
            return
        if self.usage is not None:
            self.usage.completion += 1
        if not is_end:
            self._ids.append(token)
        text = tokenizer.decode(self._ids, skip_special_tokens=True)
        stops = [at for at in map(text.find, self.prompt.request.stops) if at >= 0]
        full = len(self._ids) >= self.max_tokens
        if stops:
            text = text[: min(stops)]
        final = bool(is_end or stops or full)
        new = text[self._told : len(text) if final else self._safe(text)]
        if new:
            self._told += len(new)
            self.send("text", new)
        if final:
            self.send("end", "stop" if is_end or stops else "length")

    def _safe(self, text: str) -> int:
        """How much of the text cannot change or become part of a stop text any more."""
        end = len(text.rstrip("\ufffd"))
        for stop in self.prompt.request.stops:
            for size in range(min(len(stop) - 1, end), 0, -1):
                if text[:end].endswith(stop[:size]):
                    end -= size
                    break
        return max(end, self._told)
