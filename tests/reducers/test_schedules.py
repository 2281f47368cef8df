"""Published schedules in loops, compositions of them, and stages that need whole spans."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from support import matrix
from support.matrix import Case

from tokencomp import Kept, Plan, Reducer, Stage, Tokens, make_reducer
from tokencomp.errors import OptionError, PlanError
from tokencomp.plan.options import Traits
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
        ("prune+bipartite", {}, "first reducer must act at decoder entry"),
        ("bipartite+prune", {"share": 1.5}, "share=1.5; allowed: a number from 0 to 1"),
        ("random+prune", {"seeds": 3}, "'seeds' names no option"),
    ):
        with pytest.raises(OptionError, match=message):
            make_reducer(name, **options)


def test_plans_as_json() -> None:
    plan = make_reducer("condiv+prune", share=0.4).plan(0.7, 28)
    assert plan_from_json(json.loads(json.dumps(plan_to_json(plan)))) == plan
    short = plan_from_json([{"layer": 2, "fraction": 0.5, "reducer": "uniform"}])
    assert short == Plan((Stage(2, 0.5, make_reducer("uniform")),))
    numbers = Plan((Stage(np.int64(2), np.float32(0.5), make_reducer("uniform")),))
    assert plan_from_json(json.loads(json.dumps(plan_to_json(numbers)))) == short


def seen_by_layers(first: int, last: int, layers: int) -> list[float]:
    """AIM: layer l lets clamp(1 - (l - l1 + 1)/(l2 - l1), 0, 1) through, from layer l + 1 on."""
    seen = [1.0]
    for layer in range(layers - 1):
        through = 1.0 if layer < first else 1 - (layer - first + 1) / (last - first)
        seen.append(min(max(through, 0.0), 1.0))
    return seen


@pytest.mark.parametrize(("first", "last", "layers"), [(14, 22, 28), (13, 21, 32)])
@pytest.mark.parametrize("name", ["prune", "aim"])
def test_ramps_of_videos_and_images(name: str, first: int, last: int, layers: int) -> None:
    expected = seen_by_layers(first, last, layers)
    ratio = 1 - sum(expected) / layers
    options = {"start": first / layers, "stop": last / layers}
    plan = make_reducer(name, **options).plan(ratio, layers)
    assert plan.fractions(layers) == pytest.approx(expected, abs=1e-6)
    if first == 14:  # the default
        assert make_reducer(name).plan(ratio, layers).fractions(layers) == plan.fractions(layers)


@pytest.mark.parametrize("name", ["random", "uniform"])
def test_a_late_baseline_cuts_once_at_its_depth(name: str) -> None:
    """20 layers of 28 see all tokens; the other 8 see what the ratio leaves of the work."""
    reducer = make_reducer(name, at=20 / 28)
    (cut,) = reducer.plan(0.2, 28).stages
    assert (cut.layer, cut.fraction) == (20, pytest.approx(1 - 0.2 * 28 / 8))
    assert not serving_safe(reducer) and not reducer.deviation(0.2, 28)
    both = make_reducer(f"condiv+{name}", at=20 / 28, share=0.8)
    stages = both.plan(0.5, 28).stages
    assert [s.layer for s in stages] == [0, 20] and both.plan(0.5, 28).ratio(28) == pytest.approx(
        0.5
    )
    assert [s.reducer.name for s in stages] == ["condiv", name]


def test_a_cut_that_cannot_meet_the_ratio_is_earlier_and_marked() -> None:
    late = make_reducer("random", at=0.9)
    (cut,) = late.plan(0.5, 28).stages
    assert cut.layer == 13 and "before layer 13" in late.deviation(0.5, 28)
    both = make_reducer("divprune+random", at=0.9)
    assert both.deviation(0.75, 28) and not both.deviation(0.05, 28)
    with pytest.raises(OptionError, match="give random and uniform a depth"):
        make_reducer("divprune+random")
    with pytest.raises(OptionError, match=r"at=1\.5; allowed: a number from 0"):
        make_reducer("uniform", at=1.5)


def test_sparsevlm_at_its_published_ratio() -> None:
    """Layers 0 … 2 of 32 see 576 tokens, and those after layers 2, 6 and 15 300, 200 and 118."""
    seen = [576.0] * 3 + [300.0] * 4 + [200.0] * 9 + [118.0] * 16
    ratio = 1 - sum(seen) / 32 / 576
    reducer = make_reducer("sparsevlm")
    assert reducer.plan(ratio, 32).fractions(32) == pytest.approx([n / 576 for n in seen])
    assert not reducer.deviation(ratio, 32) and reducer.deviation(0.9, 32)


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
    with pytest.raises(PlanError, match=r"layer 3: reducer 'corners'.*layer 0 drops tokens"):
        Plan((Stage(0, 0.5, uniform), Stage(3, 0.5, corners)))
    for fine in (
        (Stage(3, 0.5, corners),),
        (Stage(0, 0.5, corners), Stage(3, 0.2, uniform)),
        (Stage(0, 1.0, uniform), Stage(3, 0.5, corners)),
    ):
        assert Plan(fine).stages == fine
