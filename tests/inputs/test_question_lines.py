"""Lines of a file of questions that cannot be read: one message, with the number and the fix."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest

from tokencomp.errors import OptionError
from tokencomp.inputs.files import FileQuestions

PICTURE = base64.b64encode(bytes(9000)).decode()
GOOD = '{"question": "What?", "answer": "red", "media": "a.png"}\n'


def refusal(folder: Path, line: str) -> str:
    """What is said about a file whose third line is `line`, without the name of the file."""
    (folder / "a.png").touch()
    (folder / "q.jsonl").write_text(f"{GOOD}\n{line}\n")
    with pytest.raises(OptionError) as raised:
        FileQuestions(folder / "q.jsonl")
    where, _, reason = str(raised.value).partition("q.jsonl, line 3: ")
    assert where == f"{folder}/"
    return reason


def line(**more: object) -> str:
    return json.dumps({"question": "What?", "answer": "red", "media": "a.png", **more})


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"media": ""}, "the media is ''. Give a path, or a list of paths."),
        ({"media": ["a.png", {"path": "a.png"}]}, "the media is {'path': 'a.png'}. Give a path"),
        ({"media": "."}, "the media '.' is the folder of the questions. Give the path of a file"),
        ({"media": "b.png"}, "b.png does not exist. Every question needs media."),
        ({"media": "http://example.com/a.jpg"}, "URLs are not read: http://example.com/a.jpg."),
        ({"media": PICTURE}, "… (12000 characters)' is no path. Give a path; pictures in base64"),
        ({"media": "a\0.png"}, "'a\\x00.png' is no path."),
        ({"question": float("nan")}, "the question is nan, which is no value. Give a text."),
        ({"answer": ["red", float("nan")]}, "the answer is nan, which is no value."),
        ({"question": "\ud83d"}, "the question has \\ud83d, one half of a character. Write the"),
    ],
)
def test_values_that_are_none(tmp_path: Path, more: dict[str, object], reason: str) -> None:
    said = refusal(tmp_path, line(**more))
    assert reason in said and len(said) < 300 + len(str(tmp_path))
    said.encode()


def test_values_that_stay_as_they_were(tmp_path: Path) -> None:
    """Whole characters in two halves, keys that are not read, and names that are not UTF-8."""
    (tmp_path / "a.png").touch()
    (tmp_path / "b\udcff.png").touch()
    rows = [
        line(question="\U0001f600", score=float("nan")),
        line(media="b\udcff.png", family=None),
        line(media=str(tmp_path / "a.png"), id=1.5),
    ]
    (tmp_path / "q.jsonl").write_bytes("\r\n".join(rows).encode())
    one, two, three = FileQuestions(tmp_path / "q.jsonl")
    assert (one.prompt, two.family, three.id) == ("\U0001f600", "", "1.5")
    assert two.media == (str(tmp_path / "b\udcff.png"),)
    assert len(FileQuestions(tmp_path / "q.jsonl", held_out=True)) in (1, 2)
