"""One line of a file of questions: the question, or an error that says what is wrong with it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokencomp.errors import OptionError
from tokencomp.inputs.questions import Example

FIELDS = "with question, answer and media"
SHOWN, OF_PATH = 80, 400
"""Characters of a value that messages show; paths end in what is wrong with them."""


def read_question(file: Path, number: int, line: str, key: str) -> Example:
    """The question in line `number` of a file, whose id is `key` if it has none."""
    where = f"{file}, line {number}"
    row = _object(where, line)
    media = row["media"] if isinstance(row["media"], list) else [row["media"]]
    right = row["answer"] if isinstance(row["answer"], list) else [row["answer"]]
    (question,) = _texts(where, "question", [row["question"]])
    answer, *also = (text.strip() for text in _texts(where, "answer", right))
    name, family = (
        _text(where, field, default if row.get(field) is None else row[field])
        for field, default in (("id", key), ("family", ""))
    )
    if not media:
        raise OptionError(f"{where}: there is no image or video. Every question needs media.")
    paths = tuple(_path(where, file.parent, one) for one in media)
    return Example(name, question, answer, paths, family, also=tuple(also))


def short(text: str, most: int = SHOWN) -> str:
    """A text that may be a whole picture in base64, as messages show it."""
    text = text.encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= most else f"{text[:most]}… ({len(text)} characters)"


def _texts(where: str, name: str, values: Sequence[Any]) -> list[str]:
    """The questions or answers of a line; numbers, true and false become words."""
    for value in values or [None]:
        if value is None or not str(value).strip():
            raise OptionError(f"{where}: the {name} is empty.")
        if isinstance(value, list | dict):
            lists = ", or a list of texts any of which is right" if name == "answer" else ""
            kind = type(value).__name__
            raise OptionError(f"{where}: the {name} has a {kind} inside. Give a text{lists}.")
    return [_text(where, name, value) for value in values]


def _text(where: str, name: str, value: Any) -> str:
    """A value as text; NaN means a missing value."""
    if isinstance(value, float) and not math.isfinite(value):
        raise OptionError(f"{where}: the {name} is {value}, which is no value. Give a text.")
    text = str(value)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = ascii(text[error.start])[1:-1]
        raise OptionError(
            f"{where}: the {name} has {half}, one half of a character. Write the whole character, "
            "e.g. \\ud83d\\ude00."
        ) from None
    return text


def _object(where: str, line: str) -> dict[str, Any]:
    wanted = f"{where}: expected a JSON object {FIELDS}"
    try:
        row = json.loads(line)
    except RecursionError:
        raise OptionError(f"{wanted}; this line has too many brackets inside brackets.") from None
    except ValueError as error:
        raise OptionError(f"{wanted}; this line is not JSON ({error}).") from error
    if not isinstance(row, dict):
        raise OptionError(f"{wanted}, one per line; got a {type(row).__name__}.")
    if absent := [name for name in ("question", "answer", "media") if name not in row]:
        has = short(", ".join(row))
        raise OptionError(f"{wanted}; {absent[0]!r} is missing (it has {has}).")
    return row


def _path(where: str, folder: Path, text: Any) -> str:
    """The path of a file or folder that exists; `folder` is that of the questions."""
    if not isinstance(text, str) or not text.strip():
        raise OptionError(f"{where}: the media is {text!r:.80}. Give a path, or a list of paths.")
    if re.match(r"data:\w+/[\w.+-]+[;,]|[A-Za-z][\w+.-]*://", text):
        raise OptionError(
            f"{where}: URLs are not read: {short(text)}. Save the file, and give its path."
        )
    path = folder / text
    try:
        path.stat()
        own = path.samefile(folder)
    except (FileNotFoundError, NotADirectoryError):
        raise OptionError(
            f"{where}: {short(str(path), OF_PATH)} does not exist. Every question needs media."
        ) from None
    except PermissionError:
        raise OptionError(
            f"{where}: no permission to open {short(str(path), OF_PATH)}. Change the permissions "
            "of its folder, e.g. chmod +rx."
        ) from None
    except (OSError, ValueError):  # too long, or with characters that no path has
        raise OptionError(
            f"{where}: {short(text)!r} is no path. Give a path; pictures in base64 are not read, "
            "save them as files."
        ) from None
    if own:
        raise OptionError(
            f"{where}: the media {text!r} is the folder of the questions. Give the path of a file, "
            "or of a folder of frames."
        )
    return str(path)
