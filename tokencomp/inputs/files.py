"""Questions in a JSON Lines file of the user, some of them held out by media."""

from __future__ import annotations

import hashlib
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tokencomp.errors import OptionError
from tokencomp.inputs.lines import FIELDS, read_question, short
from tokencomp.inputs.questions import Example

EMBEDDED = "shapesqa"
HELD_OUT = 20
"""One picture or video in so many is held out for evaluation."""


class FileQuestions(Sequence[Example]):
    """Questions from a JSON Lines file; media paths are relative to it, or absolute.

    Every line holds `question`, `answer` (or a list of answers that are right) and `media` (a path,
    or a list of paths). In place of `answer` there may be `facts` (a list, each a text or a list of
    texts that are right) with `ordered`. `id` and `family` are optional. Without an `id`, the
    number of the line among the questions is taken.

    `path` is the file, or a folder with `questions.jsonl`. `held_out`: True takes the questions
    about held-out media, False all others, None all; `count` the first so many of them. `label` is
    the file's name and a hash of its text, on which stored answers depend. Raises `OptionError` for
    a file that cannot be read, is not UTF-8 or has no lines, a line without a question, answer or
    media that exists, and two lines with the same id.
    """

    def __init__(self, path: Path, held_out: bool | None = None, count: int | None = None) -> None:
        file = questions_file(path)
        text = _text(file)
        self.label = f"{file.name} {hashlib.sha256(text.encode()).hexdigest()[:12]}"
        numbered = enumerate(text.split("\n"), 1)
        lines = [(number, line) for number, line in numbered if line.strip()]
        rows = [read_question(file, *line, str(n)) for n, line in enumerate(lines)]
        twice = [name for name, times in Counter(row.id for row in rows).items() if times > 1]
        if twice:
            raise OptionError(
                f"{file}: two questions have the id {short(twice[0])!r}, by which answers are "
                "stored."
            )
        if held_out is not None:
            root = file.parent.resolve()
            media = [[_name(Path(m), root) for m in row.media] for row in rows]
            aside = _held_out(media)
            chosen = zip(rows, media, strict=True)
            rows = [row for row, names in chosen if (names[0] in aside) is held_out]
        self.rows = rows[:count]
        if not self.rows:
            raise OptionError(
                f"{file} holds no questions for this purpose ({len(lines)} lines of objects "
                f"{FIELDS}). Part of the media is held out for evaluation, so it needs questions "
                "about two different media or more; those of one question count as one."
            )

    def check_answers(self, processor: Any, limit: int) -> None:
        """Raise `OptionError` if all right answers of a question have more than `limit` tokens."""
        tokenizer = getattr(processor, "tokenizer", processor)

        def tokens(text: str) -> int:
            return len(tokenizer(text, add_special_tokens=False)["input_ids"])

        counts = [min(map(tokens, row.replies)) for row in self.rows]
        for row, count in zip(self.rows, counts, strict=True):
            if count > limit:
                raise OptionError(
                    f"question {short(row.id)!r}: its shortest right answer has {count} tokens, "
                    f"and a model's answer ends after {limit}. Give --max-new-tokens "
                    f"{max(counts)}, which fits all questions, or a shorter answer."
                )

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:  # type: ignore[override]  # of items of any type
        return self.rows[index]


def questions_file(path: Path) -> Path:
    """The JSON Lines file that `path` names: itself, or `questions.jsonl` in a folder."""
    file = path / "questions.jsonl" if path.is_dir() else path
    if not file.is_file():
        raise OptionError(
            f"data {str(path)!r}: no such file. Expected '{EMBEDDED}', a JSON Lines file, or a "
            f"folder with questions.jsonl (one object {FIELDS} per line)."
        )
    return file


def questions_bytes(file: Path) -> bytes:
    """Content of a file of questions; raise `OptionError` if it cannot be read."""
    try:
        return file.read_bytes()
    except OSError as error:
        raise OptionError(f"{file} cannot be read: {error.strerror}.") from error


def _text(file: Path) -> str:
    try:
        text = questions_bytes(file).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise OptionError(
            f"{file} is not UTF-8 text ({error}). Give a file of JSON Lines in UTF-8."
        ) from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _name(media: Path, root: Path) -> str:
    """One name per file, however its path is written; the folder `root` may move."""
    path = media.resolve()
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.as_posix()


def _held_out(rows: Sequence[Sequence[str]]) -> set[str]:
    """Media of the held-out questions: no picture is used for both training and evaluation.

    Media of one row are kept together. Groups are ordered by a hash of their names, and the first
    that fit into the held-out share are taken; at least the smallest.
    """
    groups = sorted(
        _connected(rows),
        key=lambda group: zlib.crc32(min(group).encode("utf-8", "surrogateescape")),
    )
    room = max(1, sum(map(len, groups)) // HELD_OUT)
    aside: set[str] = set()
    for group in groups:
        if len(aside) + len(group) <= room:
            aside |= group
    return aside or min(groups, key=len, default=set())


def _connected(rows: Iterable[Sequence[str]]) -> list[set[str]]:
    """Groups of names that are connected by rows."""
    parent: dict[str, str] = {}

    def first_of(name: str) -> str:
        while parent.setdefault(name, name) != name:
            parent[name] = parent[parent[name]]
            name = parent[name]
        return name

    for names in rows:
        for name in names:
            parent[first_of(name)] = first_of(names[0])
    groups: dict[str, set[str]] = {}
    for name in parent:
        groups.setdefault(first_of(name), set()).add(name)
    return list(groups.values())
