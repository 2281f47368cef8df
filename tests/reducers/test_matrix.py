"""What every reducer must do, whatever its method: one row per reducer in `matrix.py`."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from support import matrix
from support.families import FAMILIES, Family, text
from support.matrix import Case

import tokencomp
from tokencomp import Tokens, make_reducer
from tokencomp.errors import OptionError, RatioError, ScoreError, TokenCompError
from tokencomp.plan.options import only_plans
from tokencomp.plan.plan import keep_count
from tokencomp.reducers import ScoreReducer
from tokencomp.reducers.compose import Compose
from tokencomp.reducers.registry import options_of
from tokencomp.serving.servable import serving_safe
from tokencomp.tokens.tokens import VisualSpan

FAMILY_NAMES = sorted(FAMILIES)

DECIDING: list[Case] = [("delta", {"threshold": 8}), ("pixelprune", {"then": "divprune"})]
every_case = pytest.mark.parametrize("case", matrix.cases(), ids=matrix.case_id)
every_step = pytest.mark.parametrize("case", matrix.step_cases(), ids=matrix.case_id)


@every_step
def test_budget_and_order(case: Case) -> None:
    """Every span at one ratio in three, which differ from span to span; inputs are left alone."""
    row, tried = matrix.row(case[0]), 0
    for i, grid in enumerate(matrix.GRIDS):
        given, same, n = matrix.tokens(grid), matrix.tokens(grid), math.prod(grid)
        asked = {row.keep(keep_count(n, 1 - ratio)) for ratio in matrix.RATIOS[i % 3 :: 3]}
        for keep in {k for k in asked if k < n}:
            got, tried = matrix.reduce(case, given, keep), tried + 1
            assert got.patches.dtype == torch.int64
            assert got.patches.tolist() == sorted(set(got.patches.tolist()))
            assert len(got.patches) == keep
            assert got.patches[0] >= 0 and got.patches[-1] < n
            if got.features is not None:
                assert got.features.shape == (keep, given.features.shape[1])
                assert got.weights is not None and (got.weights >= 1).all()
        for field in dataclasses.fields(given):
            before, after = getattr(same, field.name), getattr(given, field.name)
            if isinstance(before, torch.Tensor):
                assert torch.equal(before, after), field.name
        assert all(torch.equal(same.tower[s], given.tower[s]) for s in same.tower)
    assert tried > 3


@every_step
def test_ties_go_to_the_lower_index(case: Case) -> None:
    """Among equal tokens, those that come first stay; a repeated call chooses the same."""
    row, given = matrix.row(case[0]), matrix.tokens((1, 4, 5))
    given.features = torch.ones_like(given.features)
    given.scores = torch.full((20,), 0.25)
    given.tower = {signal: torch.ones_like(values) for signal, values in given.tower.items()}
    kept = matrix.reduce(case, given, row.keep(7)).patches.tolist()
    assert kept == matrix.reduce(case, given, row.keep(7)).patches.tolist()
    if row.ties:
        assert kept == list(range(7))


@pytest.mark.parametrize(
    "case",
    [c for c in matrix.step_cases() if make_reducer(c[0], **c[1]).traits.grid == "any"],
    ids=matrix.case_id,
)
def test_only_readers_of_a_known_grid_read_its_shape(case: Case) -> None:
    """The patches of an unknown grid are given as one row: the choice must be the same."""
    for grid, unknown in (((1, 8, 8), (1, 1, 64)), ((4, 4, 4), (4, 1, 16))):
        given = matrix.tokens(grid)
        for budget in (3, 12, 40):
            known, row = (
                matrix.reduce(case, dataclasses.replace(given, grids=[shape]), budget)
                for shape in (grid, unknown)
            )
            hint = f"{case[0]} reads Tokens.grids: it needs `traits = Traits(grid='known')`"
            assert torch.equal(known.patches, row.patches), hint


@every_step
def test_scored_in_fp32(case: Case) -> None:
    """Low-precision features are chosen from, and merged, as their exact fp32 copies would be.

    Features are much alike, so that scores in their own dtype would choose others. The counts are
    those of one merging step: a second one starts from rounded means.
    """
    for grid, dtype in (((1, 6, 7), torch.bfloat16), ((4, 3, 3), torch.float16)):
        low, wide = matrix.tokens(grid), matrix.tokens(grid)
        low.features, low.queries = (low.features + 4).to(dtype), [(low.queries[0] + 4).to(dtype)]
        wide.features, wide.queries = low.features.float(), [low.queries[0].float()]
        keep = matrix.row(case[0]).keep(23)
        a, b = matrix.reduce(case, low, keep), matrix.reduce(case, wide, keep)
        assert torch.equal(a.patches, b.patches)
        # a network computes in the model's dtype
        if a.features is not None and matrix.row(case[0]).fixed is None:
            rtol = torch.finfo(dtype).eps
            torch.testing.assert_close(a.features.float(), b.features, atol=0, rtol=rtol)


@every_step
def test_not_finite(case: Case) -> None:
    """NaN in what a reducer looks at is a typed error, or the reducer does not look at it."""
    row, given = matrix.row(case[0]), matrix.tokens((2, 3, 4))
    for values in (given.features, given.scores, *given.tower.values()):
        values[3] = torch.nan
    if row.blind:
        assert len(matrix.reduce(case, given, 6).patches) == 6
        return
    with pytest.raises(ScoreError, match=r"NaN|finite"):
        matrix.reduce(case, given, row.keep(6))


HOSTILE = (
    None, True, "", "x", b"x", 0, 1, -3, 2**63, 10**400, 1.5, -1.0, 1e-320, 1e30, 1e300,
    math.nan, math.inf, -math.inf, (), [1, "x"], {}, 1j, torch.ones(2),
)  # fmt: skip


@every_case
def test_any_option_value_is_refused_when_planned_or_works(case: Case) -> None:
    """Options come from requests: no value may pass the plan and end a server's forward."""
    made = make_reducer(case[0], **case[1])
    given = matrix.tokens((4, 3, 3))
    keep = matrix.row(case[0]).keep(12)
    for name, value in itertools.product(options_of(made), HOSTILE):
        options = {**case[1], name: value}
        try:
            make_reducer(case[0], **options).plan(0.7, 28)
        except OptionError:
            if not isinstance(made, Compose):
                with pytest.raises(OptionError):
                    type(made)(**options).plan(0.7, 28)
            continue
        if not only_plans(made):
            with contextlib.suppress(TokenCompError):  # there are no weights of that name
                assert len(matrix.reduce((case[0], options), given, keep).patches) == keep


def test_numbers_of_numpy_whole_numbers_for_fractions_and_paths_are_fine() -> None:
    for name in ("ccam", "selector"):
        assert options_of(make_reducer(name, weights=Path("a") / "b"))["weights"] == "a/b"
    assert make_reducer("random", seed=np.int64(7)) == make_reducer("random", seed=7)
    assert make_reducer("pool", stride=2) == make_reducer("pool", stride=np.float64(2.0))


@pytest.mark.parametrize("case", [*matrix.cases(), *DECIDING], ids=matrix.case_id)
def test_options_survive_json_and_plans_meet_the_ratio(case: Case) -> None:
    reducer = make_reducer(case[0], **case[1])
    assert make_reducer(case[0], **json.loads(json.dumps(options_of(reducer)))) == reducer
    assert hash(reducer) == hash(make_reducer(case[0], **case[1]))
    with pytest.raises(OptionError, match="'strength'"):
        make_reducer(case[0], strength=1)
    for layers in (2, 4, 7, 28, 32):
        for ratio in matrix.RATIOS:
            plan = reducer.plan(ratio, layers)
            plan.check(layers)
            assert plan.ratio(layers) == pytest.approx(ratio, abs=1e-6)
    for bad in (-0.1, 1.0, float("nan"), "half"):
        with pytest.raises(RatioError):
            reducer.plan(bad, 28)


@pytest.mark.parametrize(
    "case", [c for c in matrix.cases() if serving_safe(make_reducer(c[0], **c[1]))],
    ids=matrix.case_id,
)  # fmt: skip
def test_serving_safe_says_the_truth(case: Case) -> None:
    reducer = make_reducer(case[0], **case[1])
    assert not reducer.needs
    assert [s.layer for s in reducer.plan(0.5, 28).stages] == [0]
    given, other = matrix.tokens((4, 3, 3)), matrix.tokens((4, 3, 3))
    other.queries, other.scores = [torch.randn(9, 12)], torch.rand(36)
    count = reducer.keep_count(VisualSpan(0, 36, (4, 3, 3)), 0.4)
    kept = [matrix.kept(reducer, tokens, count).patches for tokens in (given, other)]
    assert torch.equal(*kept)


def prompts(family: Family) -> list[list[Any]]:
    return [
        [text(3), family.image(0), text(5, 2)],
        [family.video(4), text(3, 4), family.image(2), text(4, 5)],
        [text(12, 6)],
    ]


def check_batch(case: Case, ratio: float, family: Family) -> None:
    """A ragged batch keeps the same tokens, and says the same, as its samples one by one.

    The batch records gradients, and its samples do not.
    """
    model, rows = family.build(), prompts(family)
    case = matrix.on_model(case, model)

    def last_logits(rows: list[list[Any]]) -> torch.Tensor:
        inputs = family.batch(rows)
        return model(**inputs, logits_to_keep=1).logits[:, -1]

    with tokencomp.patch(model, ratio, reducer=case[0], **case[1]) as handle:
        together = last_logits(rows)
        kept = [handle.stats.kept(b) for b in range(3)]
        assert together.requires_grad
        for b, row in enumerate(rows):
            with torch.no_grad():
                alone = last_logits([row])[0]
            assert (together[b] - alone).abs().max() < 2e-5
            if b < 2:
                assert handle.stats.kept(0) == kept[b]


@pytest.mark.parametrize("case", matrix.cases(), ids=matrix.case_id)
def test_batch_equals_singles_at_the_ratio_of_the_plan(case: Case) -> None:
    """Every option set, in turn with three-row and with one-row positions."""
    number = matrix.cases().index(case)
    name, ratio = (("qwen2_vl", 0.3), ("llava_onevision", 0.75), ("qwen2_vl", 0.95))[number % 3]
    check_batch(case, ratio, FAMILIES[name])
    check_achieved(case, FAMILIES[name], (0.0, 0.25, 0.5, 0.8))


@dataclasses.dataclass(frozen=True)
class Unlike(ScoreReducer):
    """Written as docs/methods.md teaches, without a thought of other spans."""

    def scores(self, tokens: Tokens) -> torch.Tensor:
        x = tokens.features.float()
        return (x - x.mean(0)).norm(dim=1)


def test_scores_see_one_span_at_a_time() -> None:
    check_batch((cast(str, Unlike()), {}), 0.75, FAMILIES["qwen2_vl"])


FIRST = list({case[0]: case for case in reversed(matrix.cases())}.values())[::-1]
# They read the signals that visionzip and fastvid read, so they run on every family with -m long.
LATE = ("flashvid", "hiprune", "holitom", "holov", "tango", "visprune")


@pytest.mark.thin(7)
@pytest.mark.parametrize(
    "case",
    [pytest.param(c, marks=[pytest.mark.long] if c[0] in LATE else []) for c in FIRST],
    ids=lambda c: c[0],
)
def test_every_family(case: Case, family: Family) -> None:
    """The first option set of every method."""
    check_batch(case, 0.75, family)
    check_achieved(case, family, (0.5,))


def check_achieved(case: Case, family: Family, ratios: Sequence[float]) -> None:
    """What ran is the plan, to the token; only rounding stands between it and the request."""
    model, inputs = family.build(), family.batch(prompts(family)[:1])
    case, fixed = matrix.on_model(case, model), matrix.row(case[0]).fixed
    for ratio in ratios:
        handle = tokencomp.patch(model, ratio, reducer=case[0], **case[1])
        with torch.no_grad():
            model(**inputs, logits_to_keep=1)
        if ratio == 0:
            assert (handle.stats.ratio, handle.stats.kept()) == (0.0, [])
            continue
        stats, spans = handle.stats, handle.stats.spans[0]
        total = sum(s.length for s in spans)
        special = sum(len(s.special) for s in spans)
        slack = (len(spans) * 0.5 + special + 1) / total
        wanted = ratio if fixed is None else 1 - (fixed * len(spans) + special) / total
        assert stats.ratio == pytest.approx(wanted, abs=slack if fixed is None else 1e-6)
        assert [sum(map(len, stage)) for stage in stats.kept(0)] == [
            sum(c[i] for c in stats.counts[0]) for i in range(len(handle.plan.stages))
        ]
    tokencomp.unpatch(model)
