"""Lines of a file of questions that cannot be read: one message, with the number and the fix."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest
from support.unprivileged import open_folder, without

from tokencomp.errors import OptionError
from tokencomp.inputs.files import FileQuestions
from tokencomp.training.data import data_identity

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
    "more, reason",
    [
        ({"media": ""}, "the media is ''. Give a path, or a list of paths."),
        ({"media": None}, "the media is None. Give a path"),
        ({"media": ["a.png", {"path": "a.png"}]}, "the media is {'path': 'a.png'}. Give a path"),
        ({"media": "."}, "the media '.' is the folder of the questions. Give the path of a file"),
        ({"media": "./"}, "the media './' is the folder of the questions."),
        ({"media": "b.png"}, "b.png does not exist. Every question needs media."),
        ({"media": "a.png/b"}, "a.png/b does not exist."),
        ({"media": "http://example.com/a.jpg"}, "URLs are not read: http://example.com/a.jpg."),
        ({"media": "data:image/png;base64," + PICTURE}, "URLs are not read: data:image/png;base"),
        ({"media": PICTURE}, "… (12000 characters)' is no path. Give a path; pictures in base64"),
        ({"media": "a\0.png"}, "'a\\x00.png' is no path."),
        ({"media": "\ud800.png"}, "is no path."),
        ({"question": float("nan")}, "the question is nan, which is no value. Give a text."),
        ({"answer": ["red", float("nan")]}, "the answer is nan, which is no value."),
        ({"answer": float("-inf")}, "the answer is -inf, which is no value."),
        ({"family": float("nan")}, "the family is nan, which is no value."),
        ({"id": float("nan")}, "the id is nan, which is no value."),
        ({"question": "\ud83d"}, "the question has \\ud83d, one half of a character. Write the"),
        ({"answer": "\udc00!"}, "the answer has \\udc00, one half of a character."),
        ({"id": "a\ud800"}, "the id has \\ud800, one half of a character."),
        ({"family": "a\ud800"}, "the family has \\ud800, one half of a character."),
    ],
)
def test_values_that_are_none(tmp_path: Path, more: dict[str, object], reason: str) -> None:
    said = refusal(tmp_path, line(**more))
    assert reason in said and len(said) < 300 + len(str(tmp_path))
    said.encode()


def test_lines_that_are_no_object(tmp_path: Path) -> None:
    assert "too many brackets inside brackets" in refusal(tmp_path, "[" * 200_000)
    long = refusal(tmp_path, json.dumps({"image": 1, "x" * 5000: 2}))
    assert "'question' is missing (it has image, xxx" in long and len(long) < 300
    twice = {"id": PICTURE}
    (tmp_path / "q.jsonl").write_text(f"{line(**twice)}\n{line(**twice)}\n")
    with pytest.raises(OptionError, match=r"line 2: id 'AAAA.* is taken") as raised:
        FileQuestions(tmp_path / "q.jsonl")
    assert len(str(raised.value)) < 300 + len(str(tmp_path))


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


def test_files_without_permission() -> None:
    with open_folder() as folder:
        file, closed = folder / "q.jsonl", folder / "closed"
        closed.mkdir()
        (closed / "a.png").touch()
        file.write_text(line(media="closed/a.png") + "\n")
        with without(closed), pytest.raises(OptionError) as raised:
            FileQuestions(file)
        said = f"line 1: no permission to open {closed}/a.png. Change the permissions of its folder"
        assert said in str(raised.value)
        with without(file):
            for read in (FileQuestions, lambda path: data_identity(str(path))):
                with pytest.raises(OptionError, match=r"cannot be read .Permission denied"):
                    read(file)
        (closed / "questions.jsonl").touch()
        with without(closed), pytest.raises(OptionError, match="Permission denied"):
            FileQuestions(closed / "questions.jsonl")
    with pytest.raises(OptionError, match="File name too long"):
        FileQuestions(Path("x" * 5000))
