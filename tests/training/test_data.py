"""Training data: files, the embedded benchmark, teacher forcing."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from trained_support import write_data

from tokencomp.errors import OptionError, UnknownNameError
from tokencomp.evaluation.examples import Example
from tokencomp.training.data import (
    IGNORE,
    answer_ids,
    append,
    batches,
    load_batch,
    order,
    questions,
)


def test_answers_stand_behind_the_prompts_of_a_ragged_batch() -> None:
    inputs = {
        "input_ids": torch.tensor([[9, 1, 2, 3], [9, 9, 4, 5]]),
        "attention_mask": torch.tensor([[0, 1, 1, 1], [0, 0, 1, 1]]),
        "mm_token_type_ids": torch.tensor([[0, 1, 1, 0], [0, 0, 1, 0]]),
        "pixel_values": torch.zeros(3, 4),
    }
    out, labels = append(inputs, [[7], [6, 8]])
    assert out["input_ids"].tolist() == [[1, 2, 3, 7], [4, 5, 6, 8]]
    assert out["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 1]]
    assert out["mm_token_type_ids"].tolist() == [[1, 1, 0, 0], [1, 0, 0, 0]]
    assert labels.tolist() == [[IGNORE, IGNORE, IGNORE, 7], [IGNORE, IGNORE, 6, 8]]
    longer, _ = append(inputs, [[7, 7, 7], [6]])
    assert longer["input_ids"].tolist() == [[1, 2, 3, 7, 7, 7], [9, 9, 9, 4, 5, 6]]
    assert longer["attention_mask"].tolist() == [[1] * 6, [0, 0, 0, 1, 1, 1]]


def test_teacher_forcing_extends_the_prompt_the_processor_makes(tiny: Any, data: str) -> None:
    model, processor = tiny
    source = questions(data, "image", 4)
    prompt, answers = load_batch([source[0], source[1]], processor, 8)
    ids = answer_ids(processor, model, answers, end=True)
    forced, labels = append(prompt, ids)
    assert processor.tokenizer.decode(labels[0][labels[0] != IGNORE]) == "red<|im_end|>"
    assert torch.equal(forced["input_ids"][:, : -len(ids[0])], prompt["input_ids"])
    assert answer_ids(processor, model, ["red"], end=False)[0] == ids[0][:-1]
    with pytest.raises(OptionError, match="empty"):
        answer_ids(processor, model, [""], end=True)


def test_files_are_split_by_media(tmp_path: Path) -> None:
    folder = write_data(tmp_path, 60)
    rows = (folder / "questions.jsonl").read_text()
    (folder / "questions.jsonl").write_text(rows + rows)
    train = {str(e.media) for e in questions(str(folder), "image", 999, "train")}
    held = {str(e.media) for e in questions(str(folder), "image", 999, "validation")}
    assert held and len(train) + len(held) == 60 and not train & held
    assert len(questions(str(folder), "image", 7)) == 7


def test_embedded_splits_are_disjoint_and_kinds_stay_apart() -> None:
    both = questions("shapesqa", "both", 10)
    assert [e.id.split("-")[1] for e in (both[0], both[9])] == ["attribute", "needle"]
    assert both[0].id != questions("shapesqa", "both", 10, "validation")[0].id
    named = questions("shapesqa:attribute,needle,count", "image", 9)
    assert [e.family for e in named] == ["attribute", "count"] * 3 + ["needle"] * 3
    with pytest.raises(UnknownNameError, match="needle"):
        questions("shapesqa:neddle", "image", 9)
    for chosen in itertools.islice(batches(both, 3, seed=0), 20):
        assert all(i < 5 for i in chosen) or all(i >= 5 for i in chosen)


def test_orders_are_whole_passes_that_the_seed_decides() -> None:
    first = list(itertools.islice(order(5, seed=1), 10))
    assert sorted(first[:5]) == sorted(first[5:]) == [0, 1, 2, 3, 4]
    assert first == list(itertools.islice(order(5, seed=1), 10))
    assert first != list(itertools.islice(order(5, seed=2), 10))


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("{", "expected a JSON object"),
        ('{"question": "a", "answer": "b"}', "'media'"),
        ('{"question": "a", "media": "x"}', "'answer'"),
        ('{"question": "a", "answer": " ", "media": "x"}', "the answer is empty"),
        ('{"question": "a", "answer": null, "media": "x"}', "the answer is empty"),
        ('{"question": "a", "answer": "b", "media": "x"}', "x does not exist"),
        ('{"question": "a", "answer": "b", "media": []}', "no image or video"),
        ("", "holds no questions"),
    ],
)
def test_broken_files_are_refused(tmp_path: Path, line: str, told: str) -> None:
    (tmp_path / "questions.jsonl").write_text(line + "\n")
    with pytest.raises(OptionError, match=told):
        questions(str(tmp_path), "image", 4)


def test_missing_data_and_text_only_questions_are_refused(tmp_path: Path, tiny: Any) -> None:
    with pytest.raises(OptionError, match=r"questions\.jsonl"):
        questions(str(tmp_path / "none"), "image", 4)
    with pytest.raises(OptionError, match="kind"):
        questions("shapesqa", "audio", 4)
    with pytest.raises(OptionError, match="no image or video"):
        load_batch([Example("1", "What?", "red")], tiny[1], 8)
