"""Training sequences: many questions about one image or video share its visual tokens.

`isolated` packs let every question see the media and itself only, at the positions it would have
in a chat of one turn, so each is trained in exactly the form that is used at inference. `dialog`
packs are plain chats of several turns. Only answers are predicted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from tokencomp.engine.prompt import IGNORED

MARK = "\x1f"  # stands for user text while the chat template is taken apart


@dataclass(frozen=True)
class ChatForm:
    """Text around questions and answers, read off a chat template.

    `prefix` is everything up to the first question (placeholder tokens not yet expanded),
    `middle` leads from a question to its answer, `between` from an answer to the next question.
    """

    prefix: str
    middle: str
    between: str

    @staticmethod
    def from_tokenizer(tokenizer, kind: str) -> ChatForm:
        media = {"type": kind}
        question = {"type": "text", "text": MARK}
        chat = [
            {"role": "user", "content": [media, question]},
            {"role": "assistant", "content": [question]},
            {"role": "user", "content": [question]},
        ]
        text = tokenizer.apply_chat_template(chat, tokenize=False)
        prefix, middle, between, _ = text.split(MARK)
        return ChatForm(prefix, middle, between)


class Placeholders:
    """What `Packer` has to know of a model whose media are one run of a token each.

    Parameters
    ----------
    kind
        Of media.
    token
        The placeholder, as text.
    count
        Tokens of media of (frames, height, width) px.
    """

    def __init__(self, kind: str, token: str, count: Callable[[tuple[int, int, int]], int]) -> None:
        self.kinds, self.token, self.count = (kind,), token, count

    def expand(
        self, ids: Any, kind: str, shape: tuple[int, int, int], encode: Any, fps: float
    ) -> tuple[np.ndarray, np.ndarray]:
        """Ids (n,) and positions (1, n) with the one placeholder expanded."""
        (token,) = encode(self.token)
        at = list(ids).index(token)
        full = np.asarray([*ids[:at], *[token] * self.count(shape), *ids[at + 1 :]], np.int64)
        return full, np.arange(len(full))[None]


class Packer:
    """Turns (question, answer) strings into token ids, positions, segments and labels."""

    def __init__(self, tokenizer, family):
        self.tokenizer, self.family = tokenizer, family
        self.forms = {kind: ChatForm.from_tokenizer(tokenizer, kind) for kind in family.kinds}
        self._ids = lru_cache(maxsize=50_000)(self._encode)

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def ids(self, text: str) -> list[int]:
        """Token ids of ``text``, without special tokens around it."""
        return [*self._ids(text)]

    def prefix(
        self, kind: str, shape: tuple[int, int, int], fps: float = 24.0
    ) -> tuple[np.ndarray, np.ndarray]:
        """Ids (n,) and positions (rows, n) of the shared part for media of (frames, h, w) px.

        ``fps`` is the frame rate for families that write the time of every frame; processors
        assume 24 where none is given.
        """
        ids = self._ids(self.forms[kind].prefix)
        return self.family.expand(ids, kind, shape, self._ids, fps)

    def segment(self, kind: str, question: str, answer: str) -> tuple[list[int], list[int]]:
        """One question with its answer and end token; labels are set on answer and end."""
        form, end = self.forms[kind], self.tokenizer.eos_token_id
        prompt_ids = [*self._ids(question + form.middle)]
        answer_ids = [*self._ids(answer), end]
        return prompt_ids + answer_ids, [IGNORED] * len(prompt_ids) + answer_ids

    def pair(self, key: str, value: str) -> tuple[list[int], list[int]]:
        """One-hop pair: the last token of `key` predicts `value`."""
        prompt_ids, answer_ids = self._ids(key), self._ids(value)
        return [*prompt_ids, *answer_ids], [IGNORED] * len(prompt_ids) + [*answer_ids]

    def glue(self, kind: str) -> list[int]:
        """Tokens between the end of an answer and the next question of a dialog."""
        return [*self._ids(self.forms[kind].between)][1:]

    def pack(
        self,
        kind: str,
        shape: tuple[int, int, int],
        segments: list[tuple[list[int], list[int]]],
        length: int,
        dialog: bool = False,
        fps: float = 24.0,
    ) -> dict[str, np.ndarray]:
        """Fill one row of `length` tokens with as many segments as fit.

        Returns
        -------
        dict
            `ids`, `labels` (already shifted: `labels[i]` is predicted at `i`), `segment`
            (0 shared, 1.. one question each, -1 padding), `which` (index of the source segment
            at labelled places, else -1): int64 (length,); `positions`: int64 (rows, length).
        """
        ids, prefix_positions = self.prefix(kind, shape, fps)
        rows = prefix_positions.shape[0]
        out = {name: np.full(length, fill, np.int64) for name, fill in _FILL.items()}
        positions = np.zeros((rows, length), np.int64)
        at = len(ids)
        out["ids"][:at], out["segment"][:at] = ids, 0
        positions[:, :at] = prefix_positions
        start = int(prefix_positions.max()) + 1
        glue, offset = self.glue(kind) if dialog else [], 0
        for number, (tokens, labels) in enumerate(segments):
            if dialog and number:
                tokens, labels = glue + tokens, [IGNORED] * len(glue) + labels
            n = len(tokens)
            if at + n > length:
                break
            out["ids"][at : at + n] = tokens
            out["labels"][at - 1 : at + n - 1] = labels
            answer_places = np.flatnonzero(np.asarray(labels) != IGNORED) + at - 1
            out["which"][answer_places] = number
            out["segment"][at : at + n] = 0 if dialog else number + 1
            positions[:, at : at + n] = start + offset + np.arange(n)
            at += n
            offset += n if dialog else 0
        return {**out, "positions": positions}


def stacked(rows: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Rows of equal shapes as one batch: a first axis for every key."""
    return {key: np.stack([row[key] for row in rows]) for key in rows[0]}


_FILL = {"ids": 0, "labels": IGNORED, "segment": -1, "which": -1}


def attention_mask(segment):
    """Who sees whom: causal, shared part plus own segment; padding sees itself.

    Parameters
    ----------
    segment : torch.Tensor
        int64 (batch, length) as :meth:`Packer.pack` gives it.

    Returns
    -------
    torch.Tensor
        bool (batch, 1, length, length), True where query (rows) may see key (columns).
    """
    import torch

    query, key = segment[:, :, None], segment[:, None, :]
    causal = torch.ones(segment.shape[1], segment.shape[1], dtype=torch.bool).tril()
    seen = causal & ((key == 0) | (key == query)) & (key >= 0)
    own = torch.eye(segment.shape[1], dtype=torch.bool)
    return (seen | own)[:, None]
