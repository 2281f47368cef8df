"""Questions of a file, and which predictions count as right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokencomp.inputs.files import FileQuestions
from tokencomp.inputs.questions import Example


def read(folder: Path, *rows: dict[str, Any]) -> list[Example]:
    """The questions of a file with these rows, all about one picture."""
    (folder / "a.png").touch()
    file, common = folder / "q.jsonl", {"question": "What?", "media": "a.png"}
    file.write_text("".join(json.dumps({**common, **row}) + "\n" for row in rows))
    return list(FileQuestions(file))


def test_any_answer_of_a_list_is_right(tmp_path: Path) -> None:
    words, option = read(tmp_path, {"answer": ["red ", "crimson"]}, {"answer": ["B", "yield"]})
    said = ("Red.", "crimson", "['red', 'crimson']", "blue")
    assert [words.correct(one) for one in said] == [True, True, False, False]
    said = ("(B) a sign", "Yield", "A", "yield sign")
    assert [option.correct(one) for one in said] == [True, True, False, False]
    assert (words.answer, words.also) == ("red", ("crimson",))


def test_numbers_and_truths_are_words(tmp_path: Path) -> None:
    rows = read(tmp_path, {"answer": 3}, {"answer": True}, {"answer": [3, "three"]})
    assert [r.answer for r in rows] == ["3", "True", "3"]
    assert rows[1].correct("true") and rows[2].correct("Three")


def test_null_is_the_same_as_nothing(tmp_path: Path) -> None:
    row = {"answer": "red"}
    given = read(tmp_path, row, {**row, "id": None}, {**row, "id": 7, "family": None})
    assert [(e.id, e.family) for e in given] == [("0", ""), ("1", ""), ("7", "")]
