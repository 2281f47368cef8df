"""Reducers that need whole spans say so, and no plan puts them behind a stage that drops tokens."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import pytest
import torch
from support import matrix
from support.matrix import Case

from tokencomp import Kept, Plan, Reducer, Stage, Tokens, make_reducer
from tokencomp.errors import PlanError
from tokencomp.plan.reducer import Traits


@dataclass(frozen=True)
class Corners(Reducer):
    """Stands for any reducer that looks at places."""

    name = "corners"
    traits = Traits(grid="whole")

    def reduce(self, tokens: Tokens) -> Kept:
        raise NotImplementedError


def refuses_part(case: Case) -> bool:
    """Whether the reducer's own step refuses a span that has lost four of its 24 tokens."""
    whole = matrix.tokens((2, 3, 4))
    part = dataclasses.replace(
        whole,
        features=whole.features[:20],
        scores=whole.scores[:20],
        tower={signal: values[:20] for signal, values in whole.tower.items()},
        lengths=[20],
        index=torch.arange(20),
    )
    try:
        matrix.reduce(case, part, matrix.row(case[0]).keep(6))
    except PlanError:
        return True
    return False


@pytest.mark.parametrize(
    "case", [case for case in matrix.step_cases() if refuses_part(case)], ids=matrix.case_id
)
def test_what_a_step_refuses_is_declared(case: Case) -> None:
    made = make_reducer(case[0], **case[1])
    assert made.traits.grid == "whole"
    with pytest.raises(PlanError, match=r"first stage|Move the stage to layer 0"):
        Plan((Stage(0, 0.5, make_reducer("uniform")), Stage(1, 0.2, made)))


def test_only_behind_a_stage_that_drops_tokens() -> None:
    uniform, corners = make_reducer("uniform"), Corners()
    with pytest.raises(PlanError, match=r"layer 3: reducer 'corners'.*layer 0 leaves 0\.5"):
        Plan((Stage(0, 0.5, uniform), Stage(3, 0.5, corners)))
    for fine in (
        (Stage(3, 0.5, corners),),
        (Stage(0, 0.5, corners), Stage(3, 0.2, uniform)),
        (Stage(0, 1.0, uniform), Stage(3, 0.5, corners)),
    ):
        assert Plan(fine).stages == fine
