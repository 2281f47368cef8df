"""A request while the engine processes it, and its generated text."""

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
        Tokens that entered the decoder: text tokens and the visual tokens that were kept.
    completion
        Generated tokens.
    visual_before, visual_after
        Visual tokens before compression, and visual tokens that a decoder layer sees on average.
    """

    prompt: int
    completion: int = 0
    visual_before: int = 0
    visual_after: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """Return OpenAI's usage object with the counts of compression under "tokencomp"."""
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
    events
        Queue of the events.
    arrived
        Time of arrival in seconds on the monotonic clock.
    cancelled
        Set by the server when nobody waits for the answer.
    done
        Whether the last event was sent.
    usage
        Token counts, once the prefill has started.
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
    _sent: int = 0

    @property
    def group(self) -> tuple[Any, ...]:
        """Key of the batch: requests with equal groups can share one.

        A request that samples with a seed of its own has a batch of its own, because its random
        numbers must not depend on the other requests.
        """
        r = self.prompt.request
        alone = id(self) if r.seed is not None and r.temperature != 0 else None
        return self.prompt.spec, r.temperature, r.top_p, alone

    def send(self, kind: str, value: Any) -> None:
        """Send an event to the event loop. Any thread may call this method."""
        self.done = self.done or kind in ("end", "error")
        self.loop.call_soon_threadsafe(self.events.put_nowait, (kind, value))

    def add(self, token: int, tokenizer: Any, is_end: bool) -> None:
        """Add one generated token and send the text that became final.

        The job ends at an end token, at a stop text, or at its maximum length.
        """
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
        new = text[self._sent : len(text) if final else self._safe(text)]
        if new:
            self._sent += len(new)
            self.send("text", new)
        if final:
            self.send("end", "stop" if is_end or stops else "length")

    def _safe(self, text: str) -> int:
        """Return the length of the text that later tokens can no longer change.

        The end of the text may still change if it is an incomplete character (decoded as U+FFFD) or
        the beginning of a stop text.
        """
        end = len(text.rstrip("\ufffd"))
        for stop in self.prompt.request.stops:
            for size in range(min(len(stop) - 1, end), 0, -1):
                if text[:end].endswith(stop[:size]):
                    end -= size
                    break
        return max(end, self._sent)
