"""From generated tokens to the text of an answer, token by token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

INCOMPLETE = "\ufffd"  # what tokenizers decode the first bytes of a character to


class AnswerText:
    """Decodes an answer incrementally, and ends it at a stop text.

    The cost of a token does not depend on the length of the answer: only the tokens since the last
    whole character are decoded, together with the ones before them, because some tokenizers write a
    token differently at the start of a text.

    Parameters
    ----------
    tokenizer
        A Hugging Face tokenizer.
    stops
        Texts that end the answer; they are not part of it.

    Attributes
    ----------
    stopped : bool
        Whether a stop text has occurred.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()) -> None:
        self.tokenizer, self.stops = tokenizer, stops
        self.stopped = False
        self._before: list[int] = []  # tokens whose text is known
        self._new: list[int] = []
        self._pending = ""  # text that a stop text may still cut

    def add(self, token: int) -> str:
        """Add a token; return the text that later tokens can no longer change."""
        self._new.append(token)
        text = self._decode_new()
        if text and not text.endswith(INCOMPLETE):
            self._before, self._new = self._new, []
            self._pending += text
            self._find_stop()
        return self._take(len(self._pending) if self.stopped else self._certain())

    def finish(self) -> str:
        """Return the rest of the text, after the last token."""
        if not self.stopped:
            self._pending += self._decode_new()
            self._new = []
            self._find_stop()
        return self._take(len(self._pending))

    def _decode_new(self) -> str:
        """Return the text that the new tokens add to the one before them."""
        before = self._decode(self._before)
        return self._decode(self._before + self._new)[len(before) :]

    def _decode(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True) if tokens else ""

    def _find_stop(self) -> None:
        places = [at for at in map(self._pending.find, self.stops) if at >= 0]
        if places:
            self._pending = self._pending[: min(places)]
            self.stopped = True

    def _certain(self) -> int:
        """Return the length of the pending text before a possible beginning of a stop text."""
        end = len(self._pending)
        for stop in self.stops:
            for size in range(min(len(stop) - 1, len(self._pending)), 0, -1):
                if self._pending.endswith(stop[:size]):
                    end = min(end, len(self._pending) - size)
                    break
        return end

    def _take(self, size: int) -> str:
        text, self._pending = self._pending[:size], self._pending[size:]
        return text
