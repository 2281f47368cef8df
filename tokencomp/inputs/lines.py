"""One line of a file of questions: the question, or an error that says what is wrong with it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from tokencomp.errors import OptionError
from tokencomp.inputs.facts import Facts
from tokencomp.inputs.questions import Example

FIELDS = "with question, answer (or facts) and media"
SHOWN = 400
"""Characters of a value that messages show: it may be a whole picture in base64."""


def read_question(file: Path, number: int, line: str, key: str) -> Example:
    """The question in line `number` of a file, whose id is `key` if it has none."""
    where = f"{file}, line {number}"
    row = _object(where, line)
    media = _listed(row["media"])
    question = _text(where, "question", row["question"])
    facts = _facts(where, row)
    right = [facts.answer] if facts else _listed(row["answer"])
    answer, *also = (_text(where, "answer", value).strip() for value in right or [None])
    name, family = (
        default if row.get(field) is None else _text(where, field, row[field])
        for field, default in (("id", key), ("family", ""))
    )
    paths = tuple(_path(where, file.parent, one) for one in media or [None])
    return Example(name, question, answer, paths, family, also=tuple(also), facts=facts)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _facts(where: str, row: dict[str, Any]) -> Facts | None:
    """The facts of a line; None if it has an answer."""
    if row.get("facts") is None:
        return None
    if row.get("answer") is not None:
        raise OptionError(f"{where} has an answer and facts. Give one of the two.")
    facts, ordered = row["facts"], row.get("ordered")
    if not isinstance(facts, list) or not facts:
        raise OptionError(
            f"{where}: the facts are {short(repr(facts))}. Give a list with a text for each, or a "
            'list of texts where several are right: ["a red cup", ["three forks", "3 forks"]].'
        )
    if not isinstance(ordered, bool | None):
        raise OptionError(f"{where}: ordered is {short(repr(ordered))}. Give true or false.")
    wordings = []
    for number, fact in enumerate(facts, 1):
        texts = [_text(where, f"fact {number}", text).strip() for text in _listed(fact) or [None]]
        if unclear := [text for text in texts if not re.search(r"\w", text)]:
            raise OptionError(
                f"{where}: fact {number} is {short(repr(unclear[0]))}, which has no word that an "
                "answer could hold. Give words or numbers."
            )
        wordings.append(tuple(texts))
    return Facts(tuple(wordings), bool(ordered))


def short(text: str) -> str:
    """A text that may be long, as messages show it."""
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}… ({len(text)} characters)"


def _text(where: str, name: str, value: Any) -> str:
    """A value as text; numbers, true and false become words."""
    missing = value is None or value != value  # NaN, as pandas writes missing values
    if missing or isinstance(value, list | dict) or not str(value).strip():
        raise OptionError(f"{where}: the {name} is {short(repr(value))}. Give a text.")
    return str(value)


def _object(where: str, line: str) -> dict[str, Any]:
    wanted = f"{where}: expected a JSON object {FIELDS}"
    try:
        row = json.loads(line)
    except ValueError as error:
        raise OptionError(f"{wanted}; this line is not JSON ({error}).") from error
    if not isinstance(row, dict):
        raise OptionError(f"{wanted}, one per line; got a {type(row).__name__}.")
    needed = ("question", *(["answer"] if row.get("facts") is None else []), "media")
    if absent := [name for name in needed if name not in row]:
        raise OptionError(f"{wanted}; {absent[0]!r} is missing (it has {short(', '.join(row))}).")
    return row


def _path(where: str, folder: Path, text: Any) -> str:
    """The path of a file or folder that exists; `folder` holds the questions."""
    path = folder / str(text)
    try:
        found = path.exists() and not path.samefile(folder)
    except (OSError, ValueError):  # no permission, too long, or characters that no path has
        found = False
    if not found:
        raise OptionError(
            f"{where}: the media {short(repr(text))} is no file, and no folder of frames, that can "
            "be read. Give a path, or a list of paths; save media of URLs and in base64 as files."
        )
    return str(path)
