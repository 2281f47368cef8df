"""Packed answers hold exactly the bits of the records, and little else."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from benchmarks.accuracy.packed import PackedAnswers, Questions, pack, unpack
from tokencomp.evaluation.runs import EvalRun


def records(ids: list[tuple[str, int]], seed: int = 0) -> list[dict[str, Any]]:
    draw = random.Random(seed)
    labels = ("full", "bipartite-0.5", "random-0.5")
    return [
        {
            "id": f"test-{family}-{i:05d}",
            "family": family,
            "answer": draw.choice(("red", "2", "no")),
            "prompt": f"{family} {i}?",
            "correct": {label: draw.random() < 0.5 for label in labels},
        }
        for family, i in ids
    ]


def by_family(count: int, start: int = 0) -> list[tuple[str, int]]:
    return [(f, i) for f in ("count", "needle") for i in range(start, start + count)]


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 600])
def test_bits_come_back(count: int) -> None:
    bits = [random.Random(count).randrange(2) for _ in range(count)]
    assert unpack(pack(bits), count) == bits
    # 0b10100000 = 160; the first question is the highest bit
    assert pack([1, 0, 1]) == "oA=="


@pytest.mark.parametrize(
    ("ids", "in_ranges"),
    [
        (by_family(13), True),
        (by_family(13, 1500), True),
        ([(f, i) for i in range(13) for f in ("count", "needle")], True),
        ([pair for pair in by_family(13) if pair != ("count", 7)], False),
        ([("count", 3)], True),
    ],
    ids=["by family", "from 1500", "alternating", "one left out", "one alone"],
)
def test_questions_and_answers_come_back(ids: list[tuple[str, int]], in_ranges: bool) -> None:
    rows = records(ids)
    runs = {label: EvalRun(None) for label in rows[0]["correct"]}
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


def test_equal_ids_with_another_prompt_are_other_questions() -> None:
    rows = records(by_family(3))
    other = [{**r, "prompt": "Which one?"} for r in rows]
    assert Questions.of(rows) != Questions.of(other)
