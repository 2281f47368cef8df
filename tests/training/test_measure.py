"""Measurement: where answers are cut, and which answer the oracle gets."""

from __future__ import annotations

from typing import Any

import pytest

from tokencomp.evaluation import batches
from tokencomp.inputs.questions import Example
from tokencomp.training.data import answer_ids, questions
from tokencomp.training.measure import Measurement, longest_answer

LONG = "red circle on the left of the blue square"


@pytest.fixture
def parrot(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers are `LONG`, cut where the caller says."""

    def generate(model: Any, processor: Any, inputs: dict[str, Any], limit: int) -> list[str]:
        ids = processor.tokenizer(LONG)["input_ids"][:limit]
        return [processor.tokenizer.decode(ids)] * len(inputs["input_ids"])

    monkeypatch.setattr(batches, "generate", generate)


def examples_with(data: str, *answers: str) -> list[Example]:
    media = questions(data, "image", 1)[0].media
    return [Example(str(i), "What?", answer, media) for i, answer in enumerate(answers)]


@pytest.mark.parametrize(("limit", "right"), [({}, 0.5), ({"max_new_tokens": 3}, 0.0)])
def test_long_answers_are_not_cut(
    tiny: Any, data: str, parrot: None, limit: dict[str, int], right: float
) -> None:
    """The limit is that of all questions: the short one is not right because of a cut."""
    measured = Measurement({"": tiny[0]}, tiny[1], batch=1, **limit)
    measured.run(examples_with(data, "red", LONG), [])
    assert measured.table([])[0]["accuracy"] == right


def test_the_longest_answer_is_that_of_all_parts(tiny: Any) -> None:
    source = questions("shapesqa", "both", 40, "validation")
    ids = answer_ids(tiny[1], tiny[0], [source[i].answer for i in range(40)], end=True)
    assert longest_answer(tiny[1], tiny[0], source) == max(map(len, ids))
