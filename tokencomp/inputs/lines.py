"""One line of a file of questions: the question, or an error that says what is wrong with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokencomp.errors import OptionError
from tokencomp.inputs.questions import Example

FIELDS = "with question, answer and media"
SHOWN = 400
"""Characters of a value that messages show: it may be a whole picture in base64."""


def read_question(file: Path, number: int, line: str, key: str) -> Example:
    """The question in line `number` of a file, whose id is `key` if it has none."""
    where = f"{file}, line {number}"
    row = _object(where, line)
    media, right = (
        row[field] if isinstance(row[field], list) else [row[field]]
        for field in ("media", "answer")
    )
    question = _text(where, "question", row["question"])
    answer, *also = (_text(where, "answer", value).strip() for value in right or [None])
    name, family = (
        default if row.get(field) is None else _text(where, field, row[field])
        for field, default in (("id", key), ("family", ""))
    )
    paths = tuple(_path(where, file.parent, one) for one in media or [None])
    return Example(name, question, answer, paths, family, also=tuple(also))


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
    if absent := [name for name in ("question", "answer", "media") if name not in row]:
        raise OptionError(f"{wanted}; {absent[0]!r} is missing (it has {short(', '.join(row))}).")
    return row


def _path(where: str, folder: Path, text: Any) -> str:
    """The path of a file or folder that exists; `folder` is that of the questions."""
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
