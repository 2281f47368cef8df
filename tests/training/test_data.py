"""Training data: files, the embedded benchmark, teacher forcing."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.trained import write_data

from tokencomp.engine.prompt import IGNORED
from tokencomp.errors import OptionError, UnknownNameError
from tokencomp.training.data import (
    answer_ids,
    append,
    batches,
    load_batch,
    questions,
)
from tokencomp.training.measure import longest_answer


def test_answers_stand_behind_the_prompts_of_a_ragged_batch() -> None:
    inputs = {
        "input_ids": torch.tensor([[9, 1, 2, 3], [9, 9, 4, 5]]),
        "attention_mask": torch.tensor([[0, 1, 1, 1], [0, 0, 1, 1]]),
        "mm_token_type_ids": torch.tensor([[0, 1, 1, 0], [0, 0, 1, 0]]),
        "pixel_values": torch.zeros(3, 4),
    }
    out, labels = append(inputs, [[7], [6, 8]])
    assert out["input_ids"].tolist() == [[9, 1, 2, 3, 7, 7], [9, 9, 4, 5, 6, 8]]
    assert out["attention_mask"].tolist() == [[0, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]]
    assert out["mm_token_type_ids"].tolist() == [[0, 1, 1, 0, 0, 0], [0, 0, 1, 0, 0, 0]]
    assert out["pixel_values"] is inputs["pixel_values"]
    assert labels.tolist() == [[IGNORED] * 4 + [7, IGNORED], [IGNORED] * 4 + [6, 8]]


def test_teacher_forcing_extends_the_prompt_the_processor_makes(tiny: Any, data: str) -> None:
    model, processor = tiny
    source = questions(data, "image", 4)
    prompt, answers = load_batch([source[0], source[1]], processor, 8)
    ids = answer_ids(processor, model, answers, end=True)
    forced, labels = append(prompt, ids)
    assert processor.tokenizer.decode(labels[0][labels[0] != IGNORED]) == "red<|im_end|>"
    assert torch.equal(forced["input_ids"][:, : -len(ids[0])], prompt["input_ids"])
    assert answer_ids(processor, model, ["red"], end=False)[0] == ids[0][:-1]
    with pytest.raises(OptionError, match="empty"):
        answer_ids(processor, model, [""], end=True)


def pictures(data: object, purpose: str) -> set[Path]:
    """The files that questions of one part show."""
    return {Path(m).resolve() for e in questions(str(data), "image", 999, purpose) for m in e.media}


def ask(file: Path, media: list[Any]) -> Path:
    """A JSON Lines file with one question for every entry of `media`."""
    rows = [{"question": "What?", "answer": "red", "media": m} for m in media]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_files_are_split_by_media(tmp_path: Path) -> None:
    folder = write_data(tmp_path, 60)
    rows = (folder / "questions.jsonl").read_text()
    (folder / "questions.jsonl").write_text(rows + rows)
    train, held = (pictures(folder, purpose) for purpose in ("train", "validation"))
    assert len(held) == 3 and len(train) == 57 and not train & held
    assert len(questions(str(folder), "image", 7)) == 7


def test_pictures_that_questions_share_stay_on_one_side(tmp_path: Path) -> None:
    """Pairs, chains and other spellings of a path; together they are all pictures."""
    folder = write_data(tmp_path, 60)
    names = [f"{i}.png" for i in range(60)]
    alone = [*names[:30], *(f"./{n}" for n in names[:30])]
    chains = [[names[i], names[i + 1]] for i in range(30, 59) if i % 3 != 2]
    ask(folder / "questions.jsonl", [*alone, *chains])
    train, held = (pictures(folder, purpose) for purpose in ("train", "validation"))
    assert 1 <= len(held) <= 3 and not train & held
    assert train | held == {(folder / name).resolve() for name in names}


def test_embedded_splits_are_disjoint_and_kinds_stay_apart() -> None:
    both = questions("shapesqa", "both", 10)
    assert [e.id.split("-")[1] for e in (both[0], both[9])] == ["attribute", "needle"]
    assert both[0].id != questions("shapesqa", "both", 10, "validation")[0].id
    named = questions("shapesqa:attribute,needle,count", "both", 9)
    assert [e.family for e in named] == ["attribute", "count"] * 3 + ["needle"] * 3
    with pytest.raises(UnknownNameError, match="needle"):
        questions("shapesqa:neddle", "image", 9)
    for kind, other in (("image", "needle are about videos"), ("video", "count are about images")):
        with pytest.raises(OptionError, match=other):
            questions("shapesqa:needle,count", kind, 9)
    for chosen in itertools.islice(batches(both, 3, seed=0), 20):
        assert all(i < 5 for i in chosen) or all(i >= 5 for i in chosen)


def test_the_longest_answer_is_that_of_all_parts(tiny: Any) -> None:
    """It limits all answers, so that a short one is not right because of a cut."""
    source = questions("shapesqa", "both", 40, "validation")
    ids = answer_ids(tiny[1], tiny[0], [source[i].answer for i in range(40)], end=True)
    assert longest_answer(tiny[1], tiny[0], source) == max(map(len, ids))
