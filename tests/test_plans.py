"""Plans by hand: their forms, and what is refused when they are made, not at the first forward."""

from __future__ import annotations

import json
import math
import random
import warnings
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from support.families import FAMILIES, text

import tokencomp
from tokencomp import Plan, Reducer, Stage, errors, make_reducer
from tokencomp.plan.counts import Budget, BudgetShare, frame_budgets
from tokencomp.plan.plan import LEAST, keep_count
from tokencomp.plan.schedules import by_item
from tokencomp.tokens.tokens import VisualSpan


def test_plans_as_json_and_files(tmp_path: Path) -> None:
    """A plan, its JSON form and a file of it are one request, in `patch` and in `Handle.set`."""
    model, file = FAMILIES["qwen2_vl"].build(), tmp_path / "plan.json"
    stages = [
        {"layer": 0, "fraction": 0.5, "reducer": "bipartite", "options": {"weighted": False}},
        {"layer": 2, "fraction": 0.25, "reducer": "prune"},
    ]
    file.write_text(json.dumps(stages))
    merge = make_reducer("bipartite", weighted=False)
    plan = Plan((Stage(0, 0.5, merge), Stage(2, 0.25, make_reducer("prune"))))
    assert tokencomp.plan_from_json(tokencomp.plan_to_json(plan)) == plan
    for given in (plan, stages, file, str(file)):
        handle = tokencomp.patch(model, 0.9, reducer="uniform").set(plan=given)
        assert handle.plan == tokencomp.patch(model, plan=given).plan == plan
    with pytest.raises(errors.OptionError, match="reducer='bipartite'"):
        tokencomp.patch(model, plan=stages, reducer="bipartite")
    file.write_text("[{]")
    for wrong in (file, tmp_path / "none.json", tmp_path, "bipartite"):
        with pytest.raises(errors.PlanError, match="plan file"):
            tokencomp.patch(model, plan=wrong)


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ((0, math.nan, "bipartite"), "fraction=nan; expected a finite number"),
        ((0, "0.5", "bipartite"), "fraction='0.5'"),
        ((1.5, 0.5, "bipartite"), "layer=1.5; expected an integer"),
        ((True, 0.5, "bipartite"), "layer=True"),
        ((0, 0.5, "aim"), "'aim' only plans stages of other reducers"),
        ((0, 0.5, "bipartite+prune"), r"'bipartite\+prune' only plans"),
    ],
)
def test_bad_stages(stage: tuple, message: str) -> None:
    layer, fraction, name = stage
    with pytest.raises(errors.PlanError, match=message):
        Stage(layer, fraction, make_reducer(name))
    given = [{"layer": layer, "fraction": fraction, "reducer": name}]
    with pytest.raises(errors.PlanError):
        tokencomp.patch(FAMILIES["qwen2_vl"].build(), plan=given)


@pytest.mark.parametrize("name", ["ccam", "selector"])
def test_what_was_trained_for_the_entry_stays_there(name: str) -> None:
    made = make_reducer(name)
    assert Stage(0, 0.5, made).reducer is made
    with pytest.raises(errors.PlanError, match=rf"layer 2: reducer '{name}' reads the .* layer 0"):
        Stage(2, 0.5, made)
    Stage(2, 0.5, make_reducer("condiv"))


GRID, BREAKS = (1, 16, 17), tuple(range(17, 288, 18))  # an image of 272 patches and 16 line breaks


@pytest.mark.parametrize("layers", [6, 28])
@pytest.mark.parametrize("ratio", [0.5, 0.75, 0.9])
@pytest.mark.parametrize(
    "name", ["adsc", "pyramiddrop", "bipartite+adsc", "condiv+fastv", "fastv", "prune", "aim"]
)
def test_early_stages_pay_for_special_tokens_that_stay(
    name: str, ratio: float, layers: int
) -> None:
    """The ratio is met to a token per layer wherever it can be, by plain counting."""
    span = VisualSpan(0, 288, GRID, special=BREAKS)
    plan = make_reducer(name).plan(ratio, layers)
    counts = plan.counts(span, layers)
    assert counts == sorted(counts, reverse=True)
    assert all(k >= 17 for k, s in zip(counts, plan.stages, strict=True) if s.fraction > 0)
    left = dict(zip([s.layer for s in plan.stages], counts, strict=True))
    seen, now = 0, 288
    for layer in range(layers):
        now = left.get(layer, now)
        seen += now
    assert abs(seen / (288 * layers) - (1 - ratio)) < 1 / 288
    ends = [*(s.layer for s in plan.stages[1:]), layers]
    weights = [end - s.layer for end, s in zip(ends, plan.stages, strict=True)]

    def missed(kept: list[int]) -> float:
        pairs = zip(weights, kept, plan.stages, strict=True)
        return abs(sum(n * (k - 288 * s.fraction) for n, k, s in pairs))

    # Every step from what must stay to what the fractions say, tried one by one.
    most = plan._falling(span, [s.fraction for s in plan.stages])
    least = plan._falling(span, [min(s.fraction, LEAST) for s in plan.stages])
    steps = max(k - m for k, m in zip(most, least, strict=True))
    tried = [
        [m + ((k - m) * i + steps // 2) // max(1, steps) for k, m in zip(most, least, strict=True)]
        for i in range(steps + 1)
    ]
    if counts != most:
        assert missed(counts) == pytest.approx(min(map(missed, tried)))


class Later(Reducer):
    """Cuts before layer 2 at ratios in steps of 0.02, and before layer 3 at others."""

    def plan(self, ratio: float, num_layers: int) -> Plan:
        layer = 2 if math.isclose(ratio * 50, round(ratio * 50)) else 3
        seen = (num_layers * (1 - ratio) - layer) / (num_layers - layer)
        return Plan((Stage(layer, max(seen, 0.0), make_reducer("uniform")),))


@pytest.mark.parametrize("left", [0.84, 0.85])
def test_a_step_of_a_schedule_between_stages_is_spread(left: float) -> None:
    """Stages stand where probed ratios have them; an item of another ratio keeps its average."""
    (stage,) = by_item(Budget(1), Later(), 4, 1).stages
    assert stage.layer == 2 and stage.from_mean is not None
    assert (2 + 2 * stage.from_mean(left)) / 4 == pytest.approx(left)


def test_a_missed_ratio_is_told_once() -> None:
    """16 + 72 tokens: 1.6 and 7.2 should be left, 2 and 8 line breaks with one patch are."""
    family = FAMILIES["llava_onevision"]
    model, inputs = family.build(), family.batch([[text(3), family.image(0), text(5, 2)]])
    with torch.no_grad(), pytest.warns(errors.RatioWarning, match="special tokens") as warned:
        handle = tokencomp.patch(model, 0.9, reducer="uniform")
        model(**inputs)
        model(**inputs)
    assert len(warned) == 1 and handle.stats.tokens_after == [[11] * family.layers]
    assert "8 of 72 in one image" in str(warned[0].message)
    assert f"ratio 0.9 and reached {1 - 11 / 88:.3g}: special tokens" in str(warned[0].message)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        handle.set(ratio=0.5)
        model(**inputs)
        handle.set(ratio=0.9)
        model(**inputs)
    handle.set(ratio=0.95)
    with torch.no_grad(), pytest.warns(errors.RatioWarning, match=r"ratio 0\.95"):
        model(**inputs)


def frames_to_share() -> Iterator[tuple[list[int], list[int], int, int]]:
    """Weights, patches of every frame, budget, and least per frame."""
    yield [5, 2, 5], [7, 3, 7], 10, 2  # frames 0 and 2 have a remainder of 2/3, and so has frame 1
    yield [80, 32, 176], [80, 32, 176], 284, 0
    draw = random.Random(3)
    for _ in range(300):
        frames, least = draw.randint(1, 6), draw.randint(0, 2)
        weights = [draw.choice([0, 0, 1, 2, 5, 40]) for _ in range(frames)]
        most = [draw.randint(0, 7) for _ in range(frames)]
        yield weights, most, draw.randint(0, sum(most)), least


def test_budgets_of_frames_against_exact_fractions() -> None:
    """Shares in whole numbers of fractions, then one token at a time to the largest remainder."""
    for weights, most, total, least in frames_to_share():
        frames = len(weights)
        base = [min(least, n) for n in most]
        if sum(base) > total:
            base = [0] * frames
        even = weights if any(weights) else [1] * frames
        rest = total - sum(base)
        shares = [b + Fraction(w * rest, sum(even)) for b, w in zip(base, even, strict=True)]
        wanted = [min(n, math.floor(share)) for n, share in zip(most, shares, strict=True)]
        extra = [0] * frames
        while sum(wanted) + sum(extra) < total:
            left = [f for f in range(frames) if wanted[f] + extra[f] < most[f]]
            remainder = [share - math.floor(share) for share in shares]
            extra[min(left, key=lambda f: (extra[f], -remainder[f], f))] += 1
        expected = [a + b for a, b in zip(wanted, extra, strict=True)]
        assert frame_budgets([float(w) for w in weights], total, most, least) == expected


def test_halves_of_a_token_are_rounded_up() -> None:
    """In whole numbers; as floats, (1 - 0.07) · 250 is less than 232.5."""
    for percent in range(1, 100):
        for total in range(1, 600):
            exact = (total * (100 - percent) + 50) // 100
            assert keep_count(total, 1 - percent / 100) == max(1, exact)


def test_an_item_keeps_its_whole_budget() -> None:
    """Of every size; as floats, 98 · (2 / 98) is less than 2."""
    for tokens in range(1, 120):
        plan = Plan((Stage(0, 1.0, make_reducer("uniform"), budget=Budget(tokens)),))
        for size in range(tokens, 121):
            share = BudgetShare(size, (size,), 0)
            assert plan.counts(VisualSpan(0, size, (1, 1, size)), 4, share) == [tokens]


def test_a_whole_grid_after_a_budget() -> None:
    """Items above the budget lose tokens, whatever the fraction of the stage says."""
    first = Stage(0, 1.0, make_reducer("uniform"), budget=Budget(64))
    with pytest.raises(errors.PlanError, match="'vidcom2' compares places of a whole grid"):
        Plan((first, Stage(2, 0.5, make_reducer("vidcom2"))))
