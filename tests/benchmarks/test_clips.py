"""Clips of photographs: questions for `tokencomp eval`, and the page about frame policies."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.photographs import Drawings

from benchmarks.real import clips
from recipes.photographs.clip_questions import CLIP_FAMILIES
from tokencomp.errors import OptionError
from tokencomp.inputs.files import FileQuestions


def test_questions_are_read_as_files_of_ones_own_are(tmp_path: Path) -> None:
    path = clips.write_questions(Drawings(), tmp_path, "test", 1, 10.0, 32)
    examples = FileQuestions(path)
    assert [one.family for one in examples] == [*CLIP_FAMILIES]
    assert all(f"\n{one.answer}. " in one.prompt for one in examples)
    assert all(len(video) == 8 for one in examples for video in one.load(8))


def test_cells_count_clips_in_which_a_chosen_frame_shows_the_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A policy that takes the first frames sees nothing; one that takes all sees everything."""
    rule = "stream: 1 bursts"
    monkeypatch.setattr(clips, "stream_choice", lambda index, n: ([*range(index.total)], rule))
    monkeypatch.setattr(clips, "frame_indices", lambda total, count: [0])
    rows = clips.measure(Drawings(), "validation", 1, 32)
    assert [row["camera"] for row in sorted(rows, key=lambda r: r["camera"])] == [
        "pans", "stands still", "zooms",
    ]  # fmt: skip
    environment = {"command": "x", "date": "2026-01-01", "commit": "0" * 40, "versions": {}}
    report = {**environment, "hardware": {"cpu": "x", "threads": 1}, "split": "validation"}
    text = clips.page({**report, "rows": rows})
    assert "| all | any | 3 | 0 / 3 | 0 / 3 | 0 / 3 |" in text
    assert "0 at 8 frames, 0 at 16 frames, 0 at 32 frames, of 3" in text and "stream 3" in text


@pytest.mark.parametrize("arguments", (["--size", "33"], ["--seconds", "4"]))
def test_odd_sizes_and_short_clips_are_refused(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["clips", *arguments])
    with pytest.raises(OptionError, match=r"has to be even, and --seconds .* at least 10"):
        clips.main()


@pytest.mark.long
def test_the_published_page_is_that_of_its_results() -> None:
    stored = json.loads((clips.FOLDER / "clips.json").read_text())
    assert (clips.FOLDER / "clips.md").read_text() == clips.page(stored)
