"""Stored results: packed bits and questions come back."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from benchmarks.accuracy.packed import PackedAnswers, Questions, pack, unpack
from tokencomp.evaluation.runs import EvalRun

LABELS = ("full", "bipartite-0.5", "random-0.5")


def records(ids: list[tuple[str, int]]) -> list[dict[str, Any]]:
    draw = random.Random(0)
    return [
        {
            "id": f"test-{family}-{i:05d}",
            "family": family,
            "answer": draw.choice(("red", "2", "a red  circle")),
            "prompt": f"{family} {i}?",
            "correct": {label: draw.random() < 0.5 for label in LABELS},
        }
        for family, i in ids
    ]


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 600])
def test_bits_come_back(count: int) -> None:
    bits = [random.Random(count).randrange(2) for _ in range(count)]
    assert unpack(pack(bits), count) == bits
    # 0b10100000 = 160; the first question is the highest bit
    assert pack([1, 0, 1]) == "oA=="
    with pytest.raises(ValueError, match="questions"):
        unpack(pack([1] * 9), 8)


EVERY = [(family, i) for family in ("count", "needle") for i in range(1500, 1513)]


@pytest.mark.parametrize(
    ("ids", "in_ranges"),
    [
        (EVERY, True),
        (sorted(EVERY, key=lambda pair: pair[1]), True),
        ([pair for pair in EVERY if pair != ("count", 1507)], False),
    ],
    ids=["by family", "alternating", "one left out"],
)
def test_questions_and_answers_come_back(ids: list[tuple[str, int]], in_ranges: bool) -> None:
    rows = records(ids)
    runs = {label: EvalRun(None) for label in LABELS}
    for label, run in runs.items():
        for r in rows:
            correct = r["correct"][label]
            text = r["answer"] if correct else "?"
            run.records.append({**r, "prediction": text, "correct": correct})
    packed = PackedAnswers.of(runs, "full")
    stored = json.loads(json.dumps(packed.to_json()))
    assert ("ids" not in stored["questions"]) == in_ranges
    again = PackedAnswers.from_json(stored)
    assert again == packed
    for i, r in enumerate(rows):
        for label, correct in r["correct"].items():
            assert again.correct[label][i] == correct
            assert again.agrees[label][i] == (correct == r["correct"]["full"])
    assert again.questions.ids == tuple(r["id"] for r in rows)
    assert again.questions.answers == tuple(r["answer"] for r in rows)
    other = [{**r, "prompt": "Which one?"} for r in rows]
    assert Questions.of(rows) != Questions.of(other), "the same ids with other prompts"
