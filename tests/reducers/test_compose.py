"""Compositions: the parts' own schedules, multiplied, and errors that name the way out."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tokencomp import make_reducer
from tokencomp.errors import OptionError, PlanError, UnknownNameError
from tokencomp.plan.plan import Plan
from tokencomp.plan.stages import Stage
from tokencomp.reducers.compose import Compose
from tokencomp.reducers.plan_json import plan_from_json, plan_to_json
from tokencomp.serving.servable import serving_safe


@pytest.mark.parametrize(("share", "ratio"), [(0.0, 0.5), (0.3, 0.95), (1.0, 0.8)])
def test_profile_is_a_product(share: float, ratio: float) -> None:
    """Every layer sees what entry leaves times what the layer reducer alone would leave."""
    plan = make_reducer("bipartite+pyramiddrop", share=share).plan(ratio, 28)
    first = (1 - ratio) ** share
    alone = make_reducer("pyramiddrop").plan(1 - (1 - ratio) / first, 28).fractions(28)
    assert plan.fractions(28) == pytest.approx([first * f for f in alone])
    assert plan.ratio(28) == pytest.approx(ratio)


def test_options_find_their_part() -> None:
    made = make_reducer("bipartite+prune", weighted=False, **{"prune.score": "last_query"})
    entry, *later = made.plan(0.6, 28).stages
    assert entry.reducer == make_reducer("bipartite", weighted=False)
    assert {s.reducer for s in later} == {make_reducer("prune", score="last_query")}
    assert made.name == "bipartite+prune" and not serving_safe(made)


def test_refused() -> None:
    for name, options, message in (
        ("prune+bipartite", {}, "does not act at decoder entry"),
        ("adsc+prune", {}, "does not act at decoder entry"),
        ("bipartite+condiv", {}, "does not act between layers"),
        ("+prune", {}, "two different parts"),
        ("bipartite+bipartite", {}, "two different parts"),
        ("bipartite+prune+fastv", {}, "two different parts"),
        ("bipartite+prune", {"share": 1.5}, "share=1.5; allowed: a number from 0 to 1"),
        ("bipartite+prune", {"fastv.score": 1}, "no part 'fastv'"),
        ("bipartite+prune", {"bipartite.score": "last_query"}, "has no option 'score'"),
        ("random+prune", {"seeds": 3}, "neither part"),
    ):
        with pytest.raises(OptionError, match=message):
            make_reducer(name, **options)


def test_unknown_part() -> None:
    with pytest.raises(UnknownNameError, match="bipartite"):
        make_reducer("bipartit+prune")
    with pytest.raises(UnknownNameError, match="Did you mean 'bipartite'"):
        make_reducer("bipartite+")


def test_plans_as_json() -> None:
    plan = make_reducer("condiv+prune", share=0.4).plan(0.7, 28)
    assert plan_from_json(json.loads(json.dumps(plan_to_json(plan)))) == plan
    short = plan_from_json([{"layer": 2, "fraction": 0.5, "reducer": "uniform"}])
    assert short == Plan((Stage(2, 0.5, make_reducer("uniform")),))
    numbers = Plan((Stage(np.int64(2), np.float32(0.5), make_reducer("uniform")),))
    assert plan_from_json(json.loads(json.dumps(plan_to_json(numbers)))) == short


def test_bad_json() -> None:
    good = {"layer": 1, "fraction": 0.5, "reducer": "bipartite"}
    for change in (
        {"k": 2}, {"layer": "a"}, {"layer": 1.9}, {"layer": True}, {"fraction": "0.5"},
        {"fraction": float("nan")}, {"reducer": 3}, {"options": None}, {"options": {1: 2}},
    ):  # fmt: skip
        with pytest.raises(PlanError, match="stage 0"):
            plan_from_json([{**good, **change}])
    for stage in ({"layer": 1}, 7):
        with pytest.raises(PlanError, match="stage 0"):
            plan_from_json([stage])
    for plan in (None, {}, "bipartite", 3):
        with pytest.raises(PlanError, match="list of stages"):
            plan_from_json(plan)


def test_parts_are_reducers() -> None:
    with pytest.raises(OptionError, match="make_reducer"):
        Compose("bipartite", "prune")
