"""The text of an answer from its tokens, and the calls of tools in it."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

INCOMPLETE = "\ufffd"  # what tokenizers decode the first bytes of a character to
BYTE = re.compile(r"<0x([0-9A-F]{2})>")  # a token of one byte, in vocabularies with byte fallback
BYTES = {character: byte for byte, character in bytes_to_unicode().items()}  # as GPT-2 writes them

Render = Callable[..., str]
"""Renders a conversation: `render(chat, tools)`."""

NAME, KEY, VALUE, RESULT = "probe_name", "probe_key", "probe_value", "probe_result"
CALL = {"name": NAME, "arguments": {KEY: VALUE}}
TOOL = {"name": NAME, "description": "", "parameters": {"type": "object", "properties": {KEY: {}}}}
# CALL in JSON, with any white space
WRITTEN = r"\s*".join(map(re.escape, re.findall(r'"\w+"|[{}:,]', json.dumps(CALL))))


def token_bytes(tokenizer: Any, token: int, text: str) -> bytes:
    """Return the bytes of a token; its `text` does not show those of an incomplete character."""
    if INCOMPLETE not in text:
        return text.encode()
    entry = tokenizer.convert_ids_to_tokens(token)
    if byte := BYTE.fullmatch(entry):
        return bytes.fromhex(byte[1])
    if all(character in BYTES for character in entry):
        return bytes(BYTES[character] for character in entry)
    return text.encode()


class AnswerText:
    """Decodes an answer token by token, and ends it at a stop text, which sets `stopped`.

    The cost per token does not depend on the length of the answer: only tokens since the last whole
    character are decoded, with the ones before them, because some tokenizers decode a token
    differently at the start of a text.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()) -> None:
        self.tokenizer, self.stops = tokenizer, stops
        self.stopped = False
        self._before: list[int] = []  # tokens whose text is known
        self._new: list[int] = []
        self._pending = ""  # text that a stop text may still cut

    def add(self, token: int) -> str:
        """Add a token; return text that later tokens can no longer change."""
        self._new.append(token)
        text = self._decode_new()
        # Bytes of a character that is not complete wait for the next token.
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
        before = self._decode(self._before)
        return self._decode(self._before + self._new)[len(before) :]

    def _decode(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True) if tokens else ""

    def _find_stop(self) -> None:
        # The first of several stop texts ends the answer.
        places = [at for at in map(self._pending.find, self.stops) if at >= 0]
        if places:
            self._pending = self._pending[: min(places)]
            self.stopped = True

    def _certain(self) -> int:
        """Length of the pending text before a possible start of a stop text."""
        return len(self._pending) - max(
            (_overlap(self._pending, stop) for stop in self.stops), default=0
        )

    def _take(self, size: int) -> str:
        text, self._pending = self._pending[:size], self._pending[size:]
        return text


def _overlap(text: str, mark: str) -> int:
    """Length of the longest proper prefix of `mark` with which `text` ends."""
    sizes = range(min(len(mark) - 1, len(text)), 0, -1)
    return next((size for size in sizes if text.endswith(mark[:size])), 0)


# -- calls of tools --------------------------------------------------------------------------------


@dataclass(frozen=True)
class CallForm:
    """The marks around a call, which is one JSON object with its name and its arguments.

    `opening` is the first mark with the white space that follows, as `<tool_call>\\n`; `end` is
    the second one, as `</tool_call>`.
    """

    opening: str
    end: str

    @property
    def begin(self) -> str:
        return self.opening.strip()

    @classmethod
    def of(cls, render: Render, visible: Callable[[str], bool]) -> CallForm | None:
        """Find the marks in a rendered conversation with two calls and a result; else None.

        `visible` says whether a text survives decoding of an answer; special tokens do not.
        """
        call, tools = (
            {"type": "function", "function": CALL},
            [{"type": "function", "function": TOOL}],
        )
        said = {"role": "assistant", "content": [{"type": "text", "text": KEY * 2}]}
        asked = {"role": "user", "content": [{"type": "text", "text": "a"}]}
        result = {"role": "tool", "content": RESULT}
        try:
            text = render([asked, {**said, "tool_calls": [call, call]}, result], tools)
        except Exception:  # templates raise undocumented types
            return None
        # parts: what precedes the first call, what is between the two calls, and the result after
        # them.
        parts = re.split(WRITTEN, text[text.rfind(KEY * 2) + len(KEY * 2) :])
        if len(parts) != 3 or RESULT not in parts[2] or NAME not in text.partition(KEY * 2)[0]:
            return None
        form = cls(parts[0].lstrip(), "")
        end = parts[1].strip().removesuffix(form.begin).strip()
        shown = form.begin and end and visible(form.begin) and visible(end)
        return cls(form.opening, end) if shown else None


class Calls:
    """Splits the text of an answer into content and the calls `found`, incrementally.

    White space between content and a call belongs to neither; text that looks like a call but names
    none of the `names` is content, and so is all without a `form`. `begun`: the prompt ends with
    the mark that begins a call.
    """

    def __init__(
        self, form: CallForm | None = None, names: Collection[str] = (), begun: bool = False
    ) -> None:
        self.form, self.names, self.found = form, names, list[dict[str, Any]]()
        self._inside, self._mark, self._pending = begun, "", ""

    def add(self, text: str, final: bool = False) -> tuple[str, list[dict[str, Any]]]:
        """Add a piece of the answer; return new content, and the calls that it completes."""
        if self.form is None:
            return text, []
        content, known = "", len(self.found)
        self._pending += text
        while self._take_call(self.form.end, final) if self._inside else True:
            # Content before the mark, then the call; white space between them belongs to neither.
            before, mark, after = self._pending.partition(self.form.begin)
            if not mark:
                break
            content += before.rstrip()
            self._mark = before[len(before.rstrip()) :] + mark
            self._pending, self._inside = after, True
        if not self._inside:
            size = len(self._pending) - (0 if final else self._held(self.form.begin))
            content, self._pending = content + self._pending[:size], self._pending[size:]
        elif final:
            content += self._mark + self._pending
        if self.found and not content.strip():  # white space between calls
            content = ""
        return content, self.found[known:]

    def _take_call(self, end: str, final: bool) -> bool:
        """Read the call that has begun, if it is complete."""
        ends = [found.span() for found in re.finditer(re.escape(end), self._pending)]
        for start, stop in ends + [(len(self._pending),) * 2] * final:
            if (call := self._call(self._pending[:start])) is not None:
                self.found.append({"id": f"call_{uuid.uuid4().hex}", "type": "function", **call})
                self._pending, self._inside = self._pending[stop:], False
                return True
        return False

    def _call(self, text: str) -> dict[str, Any] | None:
        try:
            call = json.loads(text)
        except (ValueError, RecursionError):
            return None
        if not isinstance(call, dict) or set(call) != set(CALL) or call["name"] not in self.names:
            return None
        if not isinstance(call["arguments"], dict):
            return None
        return {"function": {**call, "arguments": json.dumps(call["arguments"])}}

    def _held(self, begin: str) -> int:
        """Length of the suffix that may precede a call: white space, or a part of its mark."""
        part = _overlap(self._pending, begin)
        before = self._pending[: len(self._pending) - part]
        return part + len(before) - len(before.rstrip())
