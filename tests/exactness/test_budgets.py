"""Budgets in tokens: exact, and as many tokens as asked for."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support import oracle
from support.families import CORE, FAMILIES, text

import tokencomp
from tokencomp import Plan, Stage, TowerStage, make_reducer, plan_from_json, plan_to_json
from tokencomp.errors import OptionError, PlanError, RatioError
from tokencomp.inputs.prompts import prompt_lengths

BUDGET = 6
SHORT = ("qwen2_vl", "llava_onevision")
SETTINGS: list[dict[str, Any]] = [
    {"budget": BUDGET, "reducer": "kcenter"},
    {"budget": BUDGET, "reducer": "condiv"},
    {"budget": BUDGET, "reducer": "pyramiddrop"},
    {"budget": {"prompt": 14}, "reducer": "kcenter"},
    {"budget": {"prompt": 14}, "reducer": "fastv"},
]


def ragged(family: Any) -> dict[str, torch.Tensor]:
    """Two prompts of different length with three images each, of sizes in another order."""
    rows = []
    for order, words in (((0, 1, 2), 4), ((2, 0, 1), 2)):
        row: list[Any] = [text(3)]
        for size in order:
            row += [family.image(size), text(words, size)]
        rows.append(row)
    return family.batch(rows)


def by_item(stats: Any, sample: int) -> list[tuple[int, list[int]]]:
    """Of every item: its visual tokens, and those left after each stage."""
    items: dict[int, list[int]] = {}
    for j, span in enumerate(stats.spans[sample]):
        items.setdefault(span.item, []).append(j)
    spans, counts = stats.spans[sample], stats.counts[sample]
    assert [*items] == [spans[own[0]].start for own in items.values()]
    return [
        (
            sum(spans[j].visual for j in own),
            [sum(left) for left in zip(*(counts[j] for j in own), strict=True)],
        )
        for own in items.values()
    ]


@pytest.mark.thin(2)
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n in SHORT else pytest.mark.long) for n in CORE],
)
@pytest.mark.filterwarnings("ignore::tokencomp.errors.RatioWarning")
def test_dropping_equals_masking(name: str, setting: dict[str, Any]) -> None:
    """Ragged batch, prefill and decoding, against the masked run of full length."""
    family = FAMILIES[name]
    model, inputs = family.build(), ragged(family)
    handle, out, masks = oracle.generated(model, family, inputs, 3, **setting)
    assert oracle.deviation(model, family, inputs, out, masks) < 1e-5
    stats = handle.stats
    assert sum(stats.tokens_after[0]) < family.layers * stats.tokens_before[0]


@pytest.mark.thin(2)
@pytest.mark.parametrize("reducer", ["kcenter", "fastv", "pyramiddrop", "aim", "bipartite+prune"])
@pytest.mark.parametrize("budget", [4, 6, 13, 1000])
def test_no_item_is_above_its_budget(reducer: str, budget: int) -> None:
    """On average over the layers; and less than one token per stage below it."""
    family = FAMILIES["qwen2_vl"]
    model, inputs = family.build(), ragged(family)
    with torch.no_grad(), tokencomp.patch(model, reducer=reducer, budget=budget) as handle:
        model(**inputs)
        stats, starts = handle.stats, [s.layer for s in handle.plan.stages]
    ends = [*starts[1:], family.layers]
    for sample in range(2):
        for size, left in by_item(stats, sample):
            layers = [starts[0], *(b - a for a, b in zip(starts, ends, strict=True))]
            seen = sum(n * k for n, k in zip(layers, [size, *left], strict=True)) / family.layers
            assert min(size, budget) - 1 < seen <= min(size, budget)
    sizes = [size for sample in range(2) for size, _ in by_item(stats, sample)]
    asked = 1 - sum(min(size, budget) for size in sizes) / sum(sizes)
    assert stats.requested_ratio == pytest.approx(asked)
    assert stats.summary()["requested_ratio"] == pytest.approx(asked)
    assert asked <= stats.ratio + 1e-9 < asked + sum(map(len, stats.spans)) / sum(sizes)


@pytest.mark.parametrize("reducer", ["fastv", "pyramiddrop"])
def test_an_item_has_the_schedule_of_its_ratio(reducer: str) -> None:
    """Every layer sees as many tokens as under the ratio that leaves as many."""
    family = FAMILIES["qwen2_vl"]
    model, inputs = family.build(), family.batch([[text(3), family.image(2), text(4, 1)]])
    (size,) = prompt_lengths(model, inputs)[0][1:]
    seen = []
    for amount in ({"budget": size * 3 // 4}, {"ratio": 1 - (size * 3 // 4) / size}):
        with torch.no_grad(), tokencomp.patch(model, reducer=reducer, **amount) as handle:
            model(**inputs)
            seen.append(handle.stats.tokens_after[0])
    assert seen[1][0] == size > seen[1][-1]
    assert all(abs(a - b) <= 1 for a, b in zip(*seen, strict=True))


@pytest.mark.parametrize("name", ["llava_onevision", "internvl"])
def test_tiles_of_an_image_share_its_budget(name: str) -> None:
    family = FAMILIES[name]
    model, inputs = family.build(), ragged(family)
    with torch.no_grad(), tokencomp.patch(model, reducer="uniform", budget=21) as handle:
        model(**inputs)
        stats = handle.stats
    assert len(stats.spans[0]) > 3
    for sample in range(2):
        items = by_item(stats, sample)
        assert len(items) == 3
        assert [left for _, left in items] == [[min(size, 21)] for size, _ in items]


def test_a_setting_that_removes_nothing_says_why() -> None:
    family = FAMILIES["qwen2_vl"]
    model, inputs = family.build(), ragged(family)
    largest = max(size for _, *sizes in prompt_lengths(model, inputs) for size in sizes)
    amounts = [({"budget": 1000}, "1,000"), ({"budget": {"prompt": 900}}, f"{largest} tokens")]
    with torch.no_grad(), tokencomp.patch(model, 0.5, reducer="uniform") as handle:
        model(**inputs)
        assert not handle.stats.reason
        for amount, word in amounts:
            handle.set(**amount)
            model(**inputs)
            assert word in handle.stats.reason and handle.stats.reason in str(handle.stats)


def test_what_an_item_keeps_does_not_depend_on_its_prompt() -> None:
    """So a cached prefix of a conversation stays valid when more media follow."""
    family = FAMILIES["qwen3_vl"]
    model = family.build()
    first = [text(3), family.image(0), text(4)]
    kept = []
    for row in (first, [*first, family.image(2), text(3)]):
        with torch.no_grad(), tokencomp.patch(model, reducer="kcenter", budget=5) as handle:
            model(**family.batch([row]))
            kept.append(handle.stats.kept(0)[0][0])
    assert kept[0] == kept[1] and len(kept[0]) == 5


def test_a_prompt_budget_is_one_ratio_for_all_items() -> None:
    """Each item keeps the same share, at least one token, and together at most the budget."""
    family = FAMILIES["qwen2_vl"]
    model, inputs = family.build(), ragged(family)
    with torch.no_grad(), tokencomp.patch(model, reducer="uniform", budget=1) as handle:
        for total in (3, 4, 14, 38, 39, 500):
            handle.set(budget={"prompt": total})
            model(**inputs)
            for sample in range(2):
                items = by_item(handle.stats, sample)
                sizes, left = [n for n, _ in items], [k[0] for _, k in items]
                share = min(1.0, total / sum(sizes))
                assert left == [max(1, math.floor(n * share + 1e-9)) for n in sizes]
                assert sum(left) <= max(total, len(left))


def test_a_plan_with_budgets_survives_json() -> None:
    """Stages by hand have budgets of their own; those of a schedule cannot be written down."""
    data = [
        {"layer": 0, "budget": 9, "reducer": "uniform", "options": {"at": 0.0}},
        {"layer": 2, "budget": 4, "reducer": "prune"},
    ]
    plan = plan_from_json(data)
    assert plan_from_json(plan_to_json(plan)) == plan
    assert plan_to_json(plan)[0] == data[0]
    family = FAMILIES["qwen2_vl"]
    model, inputs = family.build(), ragged(family)
    with torch.no_grad(), tokencomp.patch(model, plan=data) as handle:
        model(**inputs)
        for size, left in by_item(handle.stats, 0):
            assert left == [min(size, 9), min(size, 4)]
        handle.set(reducer="kcenter", budget=7)
        assert plan_to_json(handle.plan)[0]["budget"] == 7
        handle.set(reducer="fastv", budget=7)
        with pytest.raises(PlanError, match="schedule solved"):
            plan_to_json(handle.plan)


@pytest.mark.parametrize("budget", [0, -1, 1.5, "512", True, math.nan, None, 10**7, {}])
def test_bad_budgets(budget: Any) -> None:
    model = FAMILIES["qwen2_vl"].build()
    for given in (budget, {"prompt": budget}):
        if given is not None:
            with pytest.raises(RatioError, match="budget"):
                tokencomp.patch(model, budget=given)
    with pytest.raises((RatioError, PlanError), match="budget"):
        plan_from_json([{"layer": 0, "budget": budget, "reducer": "uniform"}])


def test_one_amount_at_a_time() -> None:
    model = FAMILIES["qwen2_vl"].build()
    plan = Plan((Stage(0, 0.5, make_reducer("uniform")),))
    for wrong in (
        {"ratio": 0.5, "budget": 8},
        {"ratio": 0.0, "budget": 8},
        {"plan": plan, "budget": 8},
        {"budget": 8, "tower_ratio": 0.5},
        {"budget": {"prompt": 8}, "tower_ratio": "auto"},
    ):
        with pytest.raises(OptionError):
            tokencomp.patch(model, **wrong)
    with tokencomp.patch(model, 0.5, tower_ratio=0.25) as handle:
        with pytest.raises(OptionError):
            handle.set(budget=8, tower_ratio=0.25)
        assert handle.set(budget=8).plan.tower is None  # an earlier tower ratio waits for a ratio
        assert handle.set(ratio=0.5).plan.tower == TowerStage(0, 0.75, make_reducer("kcenter"))
    for first in ({"layer": 0}, {"tower": 0}):
        stages = [{**first, "budget": 4}, {"layer": 2, "budget": 6}]
        with pytest.raises(PlanError, match="do not grow"):
            plan_from_json([{**stage, "reducer": "uniform"} for stage in stages])


def test_set_changes_the_amount() -> None:
    family = FAMILIES["qwen2_vl"]
    model, inputs = family.build(), ragged(family)
    with torch.no_grad(), tokencomp.patch(model, reducer="uniform", budget=4) as handle:
        for change, expected in (
            ({}, [4, 4, 4]),
            ({"budget": 9}, [9, 8, 9]),
            ({"reducer": "kcenter"}, [9, 8, 9]),
            ({"ratio": 0.5}, [8, 4, 8]),
            ({"budget": {"prompt": 20}}, [8, 4, 7]),
            ({"budget": 4}, [4, 4, 4]),
            ({"reducer": "uniform"}, [4, 4, 4]),
        ):
            handle.set(**change)
            model(**inputs)
            assert [left for (left,) in handle.stats.counts[0]] == expected
        assert "budget=4 (uniform at entry)" in repr(handle)


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen3_vl"])
def test_what_stays_keeps_its_coordinates(name: str) -> None:
    """Rows and columns that the decoder reads are those of the tokens in the whole picture."""
    family = FAMILIES[name]
    model, inputs = family.build(), ragged(family)
    seen: list[torch.Tensor] = []

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        seen.append(kwargs["position_ids"] if "position_ids" in kwargs else args[1])

    with tokencomp.patch(model, reducer="random", budget=5) as handle:
        hook = family.decoder(model).rotary_emb.register_forward_pre_hook(note, with_kwargs=True)
        with torch.no_grad():
            model(**inputs)
        hook.remove()
        stats = handle.stats
    got = seen[0]
    for sample, spans in enumerate(stats.spans):
        left = stats.lengths[sample] - stats.tokens_before[sample] + stats.tokens_after[sample][0]
        padding = inputs["input_ids"].shape[1] - stats.lengths[sample]
        moved = padding - (got.shape[-1] - left)  # columns before a span that are gone
        for span, offsets in zip(spans, stats.kept(sample)[0], strict=True):
            column = span.start - moved
            _, rows, columns = span.grid
            base = got[:, sample, column - 1].max() + 1
            expected = [[0, o // columns % rows, o % columns] for o in offsets]
            place = got[:, sample, column : column + len(offsets)].T - base
            assert place.tolist() == expected and len(offsets) == 5
            moved += span.length - len(offsets)
