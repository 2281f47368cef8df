"""A chat template split into the pieces of a growing conversation.

    system text, begin of a user turn │ media │ text │ end of the turn, begin of an answer │ …

The template is rendered a few times, and the differences are the pieces. Each is tokenized once,
when it is needed: ids in the cache are never recomputed.
"""

from __future__ import annotations

import itertools
from typing import Any

from tokencomp.errors import OptionError, UnsupportedModelError

A, B, C = "first-question", "first-answer", "second-question"
NO_TEMPLATE = (
    "the processor has no chat template, so a session does not know how turns begin and end. Set "
    "processor.chat_template, or load a processor of an instruct model."
)


class Turns:
    """The pieces of the chat template of a processor.

    `open`: ids of the system text and of the begin of the first user turn; `answer`: of the end of
    a user turn and the begin of an answer; `reopen`: of the end of an answer and the begin of a
    user turn.
    """

    def __init__(self, processor: Any) -> None:
        self._processor = processor
        self.tokenizer = getattr(processor, "tokenizer", processor)
        empty, one = self._render(), self._render(_text(A))
        before, _, after = one.partition(A)
        ends = zip(reversed(empty), reversed(after), strict=False)
        tail = "".join(a for a, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], ends))
        tail = tail[::-1]  # the longest common end
        self._head, self._tail = empty[: len(empty) - len(tail)], tail
        self._before, self._after = before[len(self._head) :], after[: len(after) - len(tail)]
        if not before.startswith(self._head):
            raise self._uneven("text")
        later = self._render(_text(A), answer=B, later=_text(C))
        _, _, rest = later.partition(B)
        between, _, end = rest.partition(self._before + C)
        if not rest or end != self._after + tail:
            raise self._uneven("a second turn")
        self.answer, self.reopen = self.ids(tail), self.ids(between)
        self.open, whole = self.ids(self._head), self.tokenizer(self._head)["input_ids"]
        bos = getattr(self.tokenizer, "bos_token", None)
        if whole[1:] == self.open and not (bos and self._head.startswith(bos)):
            self.open = whole  # with the BOS token of this tokenizer

    def ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def words(self, text: str) -> list[int]:
        """Token ids of text in a user turn, as the template writes it."""
        return self.ids(self._before + text + self._after)

    def media(self, modality: str) -> str:
        """Text that represents one "image" or "video" in a prompt."""
        piece = self._between(self._render({"type": modality}), modality)
        if not piece:
            raise UnsupportedModelError(
                f"the chat template writes nothing for a {modality}, so the model takes none. "
                "Append its frames as images, one by one, if it takes images."
            )
        twice = self._between(self._render({"type": modality}, {"type": modality}), modality)
        mixed = self._between(self._render({"type": modality}, _text(A)), modality)
        if twice != piece + piece or mixed != piece + self._before + A + self._after:
            raise self._uneven(f"a {modality}")
        return piece

    def _render(self, *content: dict[str, str], answer: str = "", later: Any = None) -> str:
        chat: list[dict[str, Any]] = [{"role": "user", "content": list(content)}]
        if later is not None:
            chat.append({"role": "assistant", "content": [_text(answer)]})
            chat.append({"role": "user", "content": [later]})
        if getattr(self._processor, "chat_template", None) is None:
            raise OptionError(NO_TEMPLATE)
        text: str = self._processor.apply_chat_template(
            chat, add_generation_prompt=True, tokenize=False
        )
        return text

    def _between(self, text: str, what: str) -> str:
        if not (text.startswith(self._head) and text.endswith(self._tail)):
            raise self._uneven(f"a {what}")
        return text[len(self._head) : len(text) - len(self._tail)]

    def _uneven(self, what: str) -> OptionError:
        return OptionError(
            f"the chat template of {type(self._processor).__name__} writes {what} in a way that "
            "depends on what follows or came before, so a conversation cannot be cut into turns. "
            "Give the whole conversation as one prompt, or set processor.chat_template to one that "
            "writes every item by itself."
        )


def _text(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}
