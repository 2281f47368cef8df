"""The page of what a session remembers, and the parts of its measurement."""

from __future__ import annotations

import itertools
import json

import pytest

from benchmarks.accuracy.studies import session
from tokencomp.inputs.video import Video


def test_the_page_is_that_of_the_numbers() -> None:
    report = json.loads(session.OUT.read_text())
    assert session.page(report) == session.OUT.with_suffix(".md").read_text()
    assert [row["way"] for row in report["rows"]] == [way.name for way in session.WAYS]
    limited = [row for row in report["rows"] if "rows go" in row["way"]]
    assert len(limited) == 4 and all(max(row["rows"]) == session.BUDGET for row in limited)


def test_what_flashes_is_gone_before_the_second_question() -> None:
    for stream in itertools.islice(session.streams(), 5):
        assert max(stream.evidence.frames) < session.EARLY < session.ASKED[1]


def test_parts_keep_their_times() -> None:
    video = Video(range(10), fps=8.0, indices=range(2, 42, 4))
    assert session.part(video, -3, 2).sampling.indices == (2, 6)
    cut = session.part(video, 4, 6)
    assert cut == [4, 5] and cut.sampling.indices == (18, 22) and cut.sampling.fps == 8.0


@pytest.mark.long
def test_a_short_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sessions and prompts of a stream of 8 frames agree where both hold all of it."""
    from tokencomp import zoo

    monkeypatch.setattr(session, "FRAMES", 8)
    monkeypatch.setattr(session, "ASKED", (4, 8))
    model, processor = zoo.load(session.MODEL)
    found = [session.item(session.SPLIT, session.FAMILY, 0)]
    rows = [session.measure(way, model, processor, found) for way in session.WAYS[:3]]
    assert [row["frames"] for row in rows] == [[4, 8]] * 3
    assert rows[0]["right"] == rows[2]["right"]
    assert rows[1]["rows"][1] < rows[0]["rows"][1] and rows[2]["rows"][1] < rows[0]["rows"][1]
