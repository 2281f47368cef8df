"""Reducers that look at the question see the question alone, in whatever call it stands."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import oracle, plans
from support.families import CORE, Family, text
from torch import Tensor, nn

import tokencomp
from tokencomp.engine.prompt import answer_start, packed_starts, starts_from_lengths

FAMILY_NAMES = CORE
REDUCERS = [pytest.param(plans.RELEVANT, id="condiv"), "cdpruner", "fastv", "prune", "aim"]


def kept(handle: tokencomp.Handle, rows: int) -> list:
    return [handle.stats.kept(b) for b in range(rows)]


def with_answers(inputs: dict[str, Tensor], answers: Tensor, family: Family) -> dict[str, Tensor]:
    """A batch with an answer behind every question."""
    ids = torch.cat([inputs["input_ids"], answers], 1)
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(answers)], 1)
    return family.finish({**inputs, "input_ids": ids, "attention_mask": mask})


@pytest.mark.thin(3)
@pytest.mark.parametrize("reducer", REDUCERS)
def test_the_answer_does_not_choose(family: Family, reducer: Any) -> None:
    """With labels the same tokens stay as for the question alone, whatever the answer."""
    model = family.build()
    question = family.batch([[text(3), family.image(0), text(9, 3)], [family.image(1), text(5, 4)]])
    with torch.no_grad(), tokencomp.patch(model, 0.6, reducer=reducer) as handle:
        model(**question, use_cache=False)
        expected = kept(handle, 2)
        for seed in range(4):
            answers = torch.tensor([text(6, 20 + seed), text(6, 40 + seed)])
            inputs = with_answers(question, answers, family)
            labels = torch.full_like(inputs["input_ids"], -100)
            labels[:, -6:] = answers
            labels[0, -6:-4] = -100  # the answer of the first sample is shorter
            if seed == 0:
                continue_at = inputs["input_ids"].shape[1] - 6
                assert answer_start(labels[1], 0, labels.shape[1]) == continue_at
            model(**inputs, labels=labels, use_cache=False)
            assert kept(handle, 2)[1] == expected[1]


def test_the_last_turn_asks(family: Family) -> None:
    """Of a conversation with several trained answers the last question counts."""
    model = family.build()
    turns = [text(5, 1), text(4, 2), text(6, 3)]
    history = family.batch([[family.image(0), *turns]])
    inputs = with_answers(history, torch.tensor([text(5, 4)]), family)
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -15:-11] = inputs["input_ids"][:, -15:-11]  # the answer of the first turn
    labels[:, -5:] = inputs["input_ids"][:, -5:]
    with torch.no_grad(), tokencomp.patch(model, 0.6, reducer=plans.RELEVANT) as handle:
        model(**history, use_cache=False)
        expected = kept(handle, 1)
        model(**inputs, labels=labels, use_cache=False)
        assert kept(handle, 1) == expected


@pytest.mark.thin(3)
@pytest.mark.parametrize("reducer", REDUCERS)
def test_generating_without_a_cache(family: Family, reducer: Any) -> None:
    """Every step sees the tokens generated so far; they are no question."""
    model = family.build()
    inputs = family.batch([[text(3), family.image(0), text(9, 3)], [family.image(1), text(5, 4)]])
    steps: list[list] = []
    with torch.no_grad(), tokencomp.patch(model, 0.6, reducer=reducer) as handle:
        cached = oracle.generate(model, inputs, 6)
        expected = kept(handle, 2)
        model.register_forward_hook(lambda *_: steps.append(kept(handle, 2)))
        plain = oracle.generate(model, inputs, 6, use_cache=False)
    assert len(steps) == 6 and all(step == expected for step in steps)
    assert torch.equal(cached.sequences, plain.sequences)


def test_generate_is_given_back(family: Family) -> None:
    model = family.build()
    before = dict(model.__dict__)
    handle = tokencomp.patch(model, 0.5)
    handle.set(ratio=0.75)
    tokencomp.patch(model, 0.5)
    tokencomp.unpatch(model)
    assert model.__dict__.keys() == before.keys()
    model.generate = model.generate  # someone else's wrapper stays where it was
    wrapper = model.__dict__["generate"]
    with tokencomp.patch(model, 0.5):
        oracle.generate(model, family.batch([[text(5)]]), 2)
    assert model.__dict__["generate"] is wrapper


def test_where_prompts_begin() -> None:
    assert packed_starts(torch.tensor([[0, 1, 2, 3]])) is None
    assert packed_starts(None) is None
    positions = torch.tensor([[0, 1, 2, 0, 1, 0], [5, 6, 7, 8, 9, 10]])
    assert packed_starts(positions) == [[0, 3, 5], [0]]
    assert starts_from_lengths(torch.tensor([0, 3, 5, 6]), 1, 6) == [[0, 3, 5]]
    assert starts_from_lengths(torch.tensor([0, 6]), 1, 6) is None
    assert starts_from_lengths(None, 1, 6) is None


class Wrapper(nn.Module):
    """A model that calls another one, as a trainer's wrapper does."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, ids: Tensor, labels: Tensor, rest: dict[str, Tensor]) -> Tensor:
        return self.inner(ids, **rest, labels=labels).loss


def test_arguments_by_place(family: Family) -> None:
    """Labels count however they are handed over."""
    model = family.build()
    question = family.batch([[family.image(1), text(5, 4)]])
    with torch.no_grad(), tokencomp.patch(model, 0.6, reducer=plans.RELEVANT) as handle:
        model(**question, use_cache=False)
        expected = kept(handle, 1)
        inputs = with_answers(question, torch.tensor([text(6, 20)]), family)
        labels = torch.full_like(inputs["input_ids"], -100)
        labels[:, -6:] = inputs["input_ids"][:, -6:]
        ids = inputs.pop("input_ids")
        Wrapper(model)(ids, labels, inputs)
        assert kept(handle, 1) == expected
