"""A request while the engine processes it, and its generated text."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import Any, Literal

from tokencomp.serving.hf.answer import AnswerText
from tokencomp.serving.hf.prompt import Prompt
from tokencomp.serving.hf.usage import Usage

Finish = Literal["stop", "length", "abort"]


@dataclass(eq=False)  # identity instead of equality, as prompts contain arrays
class Job:
    """One request. The engine's thread writes `events`, and the event loop reads them.

    Events are ("start", Usage), ("text", str), ("end", Finish) and ("error", exception).

    Attributes
    ----------
    prompt
        The checked request with its media.
    loop
        Event loop of the server.
    max_tokens
        Largest number of generated tokens.
    text
        The answer so far.
    events
        Queue of the events.
    arrived
        Time of arrival in seconds on the monotonic clock.
    first
        Time of the first token, on the same clock.
    cancelled
        Set by the server when the client has left.
    done
        Whether the last event was sent.
    usage
        Token counts, once the prefill has started.
    """

    prompt: Prompt
    loop: asyncio.AbstractEventLoop
    max_tokens: int
    text: AnswerText
    events: asyncio.Queue = field(default_factory=asyncio.Queue)
    arrived: float = field(default_factory=time.monotonic)
    first: float = 0.0
    cancelled: bool = False
    done: bool = False
    usage: Usage | None = None
    _count: int = 0

    @property
    def group(self) -> tuple[Any, ...]:
        """Key of the batch: requests with equal groups can share one.

        A request that samples with a seed of its own has a batch of its own, because its random
        numbers must not depend on the other requests.
        """
        r = self.prompt.request
        alone = self.prompt.alone or (r.seed is not None and r.temperature != 0)
        return self.prompt.spec, r.temperature, r.top_p, id(self) if alone else None

    def __str__(self) -> str:
        """Return setting and token counts in the form of the access log."""
        spec, usage = self.prompt.spec, self.usage
        name = getattr(spec.reducer, "name", spec.reducer)
        words = f"reducer={name} ratio={spec.shown_ratio}"
        if usage is None:
            return words + " tokens=none"
        visual = f"visual={usage.visual_before}->{usage.visual_after:g}"
        return f"{words} prompt={usage.prompt} {visual} generated={usage.completion}"

    def cancel(self) -> None:
        """Note that the client has left."""
        self.cancelled = True

    def send(self, kind: str, value: Any) -> None:
        """Send an event to the event loop. Any thread may call this method."""
        self.done = self.done or kind in ("end", "error")
        self.loop.call_soon_threadsafe(self.events.put_nowait, (kind, value))

    def add(self, token: int, is_end: bool) -> None:
        """Add one generated token and send the text that became final.

        The job ends at an end token, at a stop text, or at its maximum length.
        """
        if self.done:
            return
        self._count += 1
        if self.usage is not None:
            self.usage.completion = self._count
        is_end = is_end and not self.prompt.request.ignore_eos
        new = "" if is_end else self.text.add(token)
        final = is_end or self.text.stopped or self._count >= self.max_tokens
        if final:
            new += self.text.finish()
        if new:
            self.send("text", new)
        if final:
            self.send("end", "stop" if is_end or self.text.stopped else "length")
