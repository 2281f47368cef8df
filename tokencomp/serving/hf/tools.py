"""Calls of tools: how a chat template writes them, and how they are read from an answer."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

Render = Callable[..., str]
"""Renders a conversation: `render(chat, tools)`."""

NAME, KEY, VALUE, RESULT = "probe_name", "probe_key", "probe_value", "probe_result"
CALL = {"name": NAME, "arguments": {KEY: VALUE}}
TOOL = {"name": NAME, "description": "", "parameters": {"type": "object", "properties": {KEY: {}}}}
# CALL in JSON, with any white space
WRITTEN = r"\s*".join(map(re.escape, re.findall(r'"\w+"|[{}:,]', json.dumps(CALL))))


@dataclass(frozen=True)
class CallForm:
    """The marks around a call, which is one JSON object with its name and its arguments.

    Attributes
    ----------
    opening
        The first mark with the white space behind it, such as `<tool_call>\\n`.
    end
        The second mark, such as `</tool_call>`.
    """

    opening: str
    end: str

    @property
    def begin(self) -> str:
        """The first mark."""
        return self.opening.strip()

    @classmethod
    def of(cls, render: Render, visible: Callable[[str], bool]) -> CallForm | None:
        """Find the marks in what a chat template makes of two calls and a result.

        None if the template knows no tools, or writes their calls in another form. `visible` says
        whether a text survives the decoding of an answer; special tokens do not.
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
        parts = re.split(WRITTEN, text[text.rfind(KEY * 2) + len(KEY * 2) :])
        if len(parts) != 3 or RESULT not in parts[2] or NAME not in text.partition(KEY * 2)[0]:
            return None
        form = cls(parts[0].lstrip(), "")
        end = parts[1].strip().removesuffix(form.begin).strip()
        shown = form.begin and end and visible(form.begin) and visible(end)
        return cls(form.opening, end) if shown else None


class Calls:
    """Divides the text of an answer into content and calls, as it grows.

    What is not a call of a known tool with an object of arguments stays content.

    Parameters
    ----------
    form
        The marks; None takes everything as content.
    names
        Tools that may be called.
    begun
        Whether the prompt ends with the mark that begins a call.

    Attributes
    ----------
    found : list of dict
        The calls so far, in the form of OpenAI's API.
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
        """Length of the end of the text that a call may follow: white space, part of its mark."""
        sizes = range(len(begin) - 1, 0, -1)
        part = next((n for n in sizes if self._pending.endswith(begin[:n])), 0)
        before = self._pending[: len(self._pending) - part]
        return part + len(before) - len(before.rstrip())
