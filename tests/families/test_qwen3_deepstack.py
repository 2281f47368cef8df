"""Deepstack: gathered at entry, and no layer stage before its last addition."""

from __future__ import annotations

import pytest
import torch
from support.families import FAMILIES, text
from support.family.qwen import Qwen3VL

import tokencomp
from tokencomp import Plan, Stage, make_reducer
from tokencomp.errors import PlanError
from tokencomp.plan.schedules import not_before


class Deep(Qwen3VL):
    deepstack = (0, 2)


def test_early_layer_stage_is_refused() -> None:
    plan = Plan((Stage(1, 0.5, make_reducer("uniform")),))
    with pytest.raises(PlanError, match="from layer 2 on"):
        tokencomp.patch(Deep().build(), plan=plan)
    tokencomp.patch(Deep().build(), plan=Plan((Stage(2, 0.5, make_reducer("uniform")),)))
    tokencomp.patch(FAMILIES["qwen2_vl"].build(), plan=plan)


@pytest.mark.parametrize("ratio", [0.2, 0.5, 0.8, 0.9])
@pytest.mark.parametrize("schedule", ["aim", "pyramid", "fastv"])
def test_schedules_wait(ratio: float, schedule: str) -> None:
    """A named reducer moves its stages and keeps its ratio; and it runs."""
    family = Deep()
    model = family.build()
    with tokencomp.patch(model, ratio, reducer="prune", schedule=schedule) as handle:
        assert all(s.layer == 0 or s.layer >= 2 for s in handle.plan.stages)
        assert handle.plan.ratio(4) == pytest.approx(ratio)
        with torch.no_grad():
            model(**family.batch([[text(3), family.image(0), text(5)]]))


@pytest.mark.parametrize("first", [1, 2, 3, 4])
@pytest.mark.parametrize("layers", [4, 28, 36])
@pytest.mark.parametrize("reducer", ["prune", "aim"])
def test_not_before(first: int, layers: int, reducer: str) -> None:
    for ratio in (0.05, 0.3, 0.5, 0.75, 0.9, 0.95):
        plan = make_reducer(reducer).plan(ratio, layers)
        moved = not_before(plan, first, layers)
        assert moved.ratio(layers) == pytest.approx(ratio)
        assert all(s.layer == 0 or s.layer >= first for s in moved.stages)
        if all(s.layer == 0 or s.layer >= first for s in plan.stages):
            assert moved is plan


def test_text_between_frames_stays() -> None:
    """It survives a stage that removes every visual token, and is not counted."""
    family = Deep()
    model = family.build()
    inputs = family.batch([[text(3), family.video(4), text(5)]])
    uniform = make_reducer("uniform")
    plan = Plan((Stage(0, 0.5, uniform), Stage(3, 0.0, uniform)))
    with torch.no_grad(), tokencomp.patch(model, plan=plan) as handle:
        model(**inputs)
        stats = handle.stats
    assert stats.tokens_before == [16]
    assert stats.tokens_after == [[8, 8, 8, 0]]
    assert stats.kept()[1] == [[8, 9, 10, 11, 12]]
    assert len(stats.kept()[0][0]) == 8 + 5
