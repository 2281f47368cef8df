"""The stored answers of `benchmarks.accuracy.studies.tower`, by question set.

tower.json holds, per set: the model and the hash of its weights, the split, the accuracy of a blind
guess, provenance, and the answers in the packed form of `benchmarks.accuracy.packed`. Rows have
the keys "NAME@TOWER RATIO".
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks import publishing
from benchmarks.accuracy.packed import PackedAnswers, pack, unpack
from tokencomp.evaluation.settings import DOWNSCALE, FEWER_FRAMES

DISTANCE = "tower_distance.json"
"""Answers from which the weights of contrast and change were chosen, once."""
FULL, CEILING = "full@0", "entry only@0"
CHOSEN = ("kcenter", "runlength", "keyframes", "random", "uniform")
"""Methods in the tower; keyframes has stored rows alone, see the head of the page."""
SMALLER = (DOWNSCALE, FEWER_FRAMES)
ORDER = ("full", "entry only", "random at entry", *CHOSEN, *SMALLER)
"""Rows of a table, from top to bottom."""
IDENTITY = ("model", "weights", "split", "blind", "vivid")
"""What all rows of a set share."""

Sets = dict[str, dict[str, Any]]


def read(path: Path) -> Sets:
    """All sets in the file; none if it does not exist.

    Returns
    -------
    dict
        `answers` of every set is `PackedAnswers`, and `vivid` says for every question whether its
        background has the colours of objects: a list of 0 and 1, empty where none has.
    """
    if not path.exists():
        return {}
    sets: Sets = publishing.read(path)["sets"]
    for entry in sets.values():
        entry["answers"] = PackedAnswers.from_json(entry["answers"])
        count = len(entry["answers"].questions)
        entry["vivid"] = unpack(entry["vivid"], count) if entry["vivid"] else []
    return sets


def write(path: Path, sets: Sets) -> None:
    """Write all sets."""
    stored = {
        name: {
            **entry,
            "vivid": pack(entry["vivid"]) if entry["vivid"] else "",
            "answers": entry["answers"].to_json(),
        }
        for name, entry in sets.items()
    }
    publishing.write(path, {"sets": stored})


def with_rows(entry: dict[str, Any], rows: PackedAnswers, facts: dict[str, Any]) -> dict[str, Any]:
    """The set with more rows, in the order of its table.

    Parameters
    ----------
    facts
        Provenance of the new rows.
    """
    answers = entry["answers"].joined(rows) if "answers" in entry else rows
    keys = sorted(answers.correct, key=_place)
    return {
        **entry,
        "commits": sorted({*entry.get("commits", ()), str(facts.get("commit"))}),
        "provenance": facts,
        "answers": PackedAnswers(answers.questions, {k: answers.correct[k] for k in keys}),
    }


def row_of(key: str) -> str:
    """The name in the key of a row."""
    return key.rpartition("@")[0]


def _place(key: str) -> tuple[int, float]:
    return ORDER.index(row_of(key)), float(key.rpartition("@")[2])
