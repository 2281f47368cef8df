"""Plans and method specs with a stage in the vision tower: counts, ratios, JSON, bad input."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from support.families import FAMILIES, IMAGE, text

import tokencomp
from tokencomp import Plan, Stage, TowerStage, make_reducer, plan_from_json, plan_to_json
from tokencomp.errors import (
    OptionError,
    PlanError,
    RatioError,
    RatioWarning,
    SpanError,
)
from tokencomp.method import Method
from tokencomp.plan.counts import BudgetShare
from tokencomp.tokens.tokens import VisualSpan

UNIFORM = make_reducer("uniform")


@pytest.mark.parametrize("grid", [(1, 1, 1), (1, 5, 7), (4, 3, 3), (3, 8, 8)])
@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.38, 0.4, 0.5, 1.0])
def test_counts(grid: tuple[int, int, int], fraction: float) -> None:
    """Half of the cells or more are rounded up, at least one stays; frames count one by one."""
    t, h, w = grid
    span = VisualSpan(5, t * h * w + 2, grid, special=(0, 1))
    whole = TowerStage(0, fraction, UNIFORM)
    apart = TowerStage(0, fraction, UNIFORM, frames_apart=True)
    assert whole.tokens(span) == max(1, math.floor(t * h * w * fraction + 0.5)) + 2
    each = t * max(1, math.floor(h * w * fraction + 0.5))
    assert apart.tokens(span) == each + 2
    # An entry stage of the same fraction rounds once, and cannot keep more than the tower has.
    span, once = VisualSpan(5, t * h * w, grid), max(1, math.floor(t * h * w * fraction + 0.5))
    assert Plan((Stage(0, fraction, UNIFORM),), apart).counts(span, 4) == [min(each, once)]


@pytest.mark.parametrize("fraction", [0.07, 0.33, 0.5, 0.77])
def test_a_part_never_keeps_more_than_its_bound(fraction: float) -> None:
    stage = TowerStage(0, fraction, UNIFORM)
    for sizes in ([9, 9, 9, 9], [9, 2, 9], [9, 3, 9, 1], [1, 1], [9], [2, 9, 9, 4, 4, 9]):
        kept = stage.cells([(1, 1, n) for n in sizes])
        assert sum(kept) == max(1, math.floor(sum(sizes) * fraction + 0.5))
        assert all(k <= min(n, stage.most(9)) for k, n in zip(kept, sizes, strict=True))


@pytest.mark.parametrize(
    "reducer", ["condiv", "fastv", "pyramiddrop", "aim", "bipartite+prune", "adsc"]
)
@pytest.mark.parametrize("ratio", [0.4, 0.6, 0.75, 0.9])
def test_the_ratio_of_the_decoder_stays(reducer: str, ratio: float) -> None:
    """Whatever leaves in the tower, the decoder sees as many tokens on average as without."""
    spec = Method(reducer, ratio)
    plain = spec.stages(28, 1)
    for tower_ratio in (0.1, 0.4, ratio - 0.05, ratio):
        if tower_ratio > ratio:
            continue
        plan = Method(reducer, ratio, tower_ratio=tower_ratio).stages(28, 1)
        assert plan.tower is not None
        assert plan.tower.fraction == pytest.approx(1 - tower_ratio)
        assert plan.ratio(28) == pytest.approx(plain.ratio(28))
        profile = plan.fractions(28)
        assert max(profile) <= plan.tower.fraction + 1e-9
        assert profile == sorted(profile, reverse=True)


@pytest.mark.parametrize("reducer", ["condiv", "fastv", "pyramiddrop", "aim", "bipartite+prune"])
def test_the_budget_of_the_decoder_stays(reducer: str) -> None:
    """On average over its layers an item has 512 tokens, of at most 819 that leave the tower."""
    plan = Method(reducer, budget=512, tower_ratio="auto").stages(28, 1)
    for size in (300, 600, 1000, 4000):
        profile = plan.fractions(28, "image", BudgetShare(size, (size,), 0))
        assert sum(profile) / 28 == pytest.approx(min(1, 512 / size))
        assert max(profile) <= min(1, 819 / size) + 1e-9
        assert profile == pytest.approx(sorted(profile, reverse=True))


def test_auto_keeps_more_than_the_decoder_will_see() -> None:
    for ratio, expected in ((0.75, 0.4), (0.9, 0.4), (0.6, 0.36), (0.5, 0.2), (0.3, 0.0)):
        assert Method(ratio=ratio, tower_ratio="auto").dropped_cells == pytest.approx(expected)


def test_json() -> None:
    stage = {"layer": 0, "fraction": 0.25, "reducer": "bipartite"}
    data = [{"tower": 0, "fraction": 0.4, "reducer": "kcenter", "options": {"pool": 2}}, stage]
    plan = plan_from_json(data)
    assert plan.tower == TowerStage(0, 0.4, make_reducer("kcenter", pool=2))
    assert plan.stages == (Stage(0, 0.25, make_reducer("bipartite")),)
    assert plan_from_json(plan_to_json(plan)) == plan
    plan = Method("kcenter", budget=512, tower_ratio="auto").stages(28, 1)
    sizes = [
        {k: v for k, v in s.items() if k in ("tower", "layer", "budget")}
        for s in plan_to_json(plan)
    ]
    assert sizes == [{"tower": 0, "budget": 819}, {"layer": 0, "budget": 512}]
    assert plan_from_json(plan_to_json(plan)) == plan
    with pytest.raises(PlanError, match="stage 1"):  # the tower comes first
        plan_from_json(data[::-1])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (dict(ratio=0.5, tower_ratio=0.8), PlanError, "tower_ratio=0.8 .* ratio=0.5"),
        (dict(tower_ratio=0.8), PlanError, "ratio=0.5"),
        (dict(ratio=0.5, tower_ratio=1.0), RatioError, "tower_ratio=1.0"),
        (dict(ratio=0.5, tower_ratio="most"), RatioError, "tower_ratio='most'"),
        (dict(ratio=0.5, tower_ratio=0.2, tower_reducer="bipartite"), PlanError, "merges"),
        (dict(ratio=0.5, tower_ratio=0.2, tower_reducer="condiv"), PlanError, "question"),
        (dict(ratio=0.5, tower_ratio=0.2, tower_reducer="fastv"), PlanError, "attention"),
        (dict(ratio=0.5, tower_ratio=0.2, tower_reducer="aim"), PlanError, "plans stages"),
        (dict(ratio=0.5, tower_ratio=0.2, tower_reducer="kcentr"), LookupError, "kcenter"),
        (
            dict(ratio=0.5, tower_ratio=0.2, reducer="evs"),
            PlanError,
            "the tower stage drops tokens",
        ),
        (dict(ratio=0.5, tower_ratio=0.2, reducer="vidcom2"), PlanError, "whole grid"),
        (dict(plan=[], tower_ratio=0.2), OptionError, "tower_ratio=0.2"),
        (
            dict(plan=[{"tower": 7, "fraction": 0.5, "reducer": "random"}]),
            PlanError,
            "block 7, but Qwen2-VL uses the blocks 0 … 0",
        ),
        (dict(plan=[{"tower": 0, "fraction": 0.0, "reducer": "random"}]), PlanError, "fraction"),
    ],
)
def test_bad_input(call: dict, error: type[Exception], message: str) -> None:
    model = FAMILIES["qwen2_vl"].build()
    with pytest.raises(error, match=message):
        tokencomp.patch(model, **call)
    handle = tokencomp.patch(model, 0.5)
    with pytest.raises(PlanError, match=r"tower_ratio=0\.6"):
        handle.set(tower_ratio=0.6)
    assert handle.plan.tower is None


def test_features_of_another_setting_are_refused() -> None:
    """Features with other cells than the plan leaves, or read uncompressed, are an error."""
    family = FAMILIES["llava_onevision"]
    model = family.build()
    inputs = family.batch([[text(3), family.video(4), text(4)]])
    pixels = {"pixel_values_videos": inputs.pop("pixel_values_videos")}
    options = dict(vision_feature_layer=-1, vision_feature_select_strategy="full")

    def embeds() -> torch.Tensor:
        out = model.model.get_video_features(**pixels, **options)
        features = getattr(out, "pooler_output", out).flatten(0, 1)
        x = model.get_input_embeddings()(inputs["input_ids"])
        return x.masked_scatter((inputs["input_ids"] == 151)[..., None], features)

    types = 2 * (inputs["input_ids"] == 151).int()
    call = {"attention_mask": inputs["attention_mask"], "mm_token_type_ids": types}
    with torch.no_grad():
        whole = embeds()
        with tokencomp.patch(model, 0.75, tower_ratio=0.5) as handle:
            short = embeds()
            with pytest.raises(SpanError, match="17 of its 17 tokens, but the tower stage"):
                model(inputs_embeds=whole, **call)
            assert model(inputs_embeds=short, **call).logits.isfinite().all()
            with handle.disabled(), pytest.raises(SpanError, match="8 visual tokens were dropped"):
                model(inputs_embeds=short, **call)
            handle.set(tower_ratio=0.3)
            with pytest.raises(SpanError, match="9 of its 17 tokens, but the tower stage"):
                model(inputs_embeds=short, **call)
            handle.set(ratio=0.0, tower_ratio=0.0)
            with pytest.raises(SpanError, match="8 visual tokens were dropped"):
                model(inputs_embeds=short, **call)


def test_a_tower_alone_that_rounds_up_misses_the_ratio() -> None:
    """4 frames of 4 cells and a line break: 1.7 tokens should be left, 5 are."""
    family = FAMILIES["llava_onevision"]
    model, inputs = family.build(), family.batch([[text(3), family.video(4), text(4)]])
    handle = tokencomp.patch(model, 0.9, reducer="uniform", tower_ratio=0.9)
    assert not handle.plan.stages
    with torch.no_grad(), pytest.warns(RatioWarning, match="vision tower keeps") as warned:
        model(**inputs)
        model(**inputs)
    assert len(warned) == 1 and f"ratio 0.9 and reached {1 - 5 / 17:.5g}" in str(warned[0].message)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        handle.set(ratio=0.5, tower_ratio=0.5)  # 9 of 17 are left, which is rounding
        model(**inputs)
    handle.set(ratio=0.95, tower_ratio=0.95)
    with torch.no_grad(), pytest.warns(RatioWarning, match=r"ratio 0\.95"):
        model(**inputs)


def test_images_whose_tiles_are_interpolated() -> None:
    """LLaVA-OneVision makes 5 × 5 tokens of the 8 × 8 patches of four tiles, if two are allowed."""
    family = FAMILIES["llava_onevision"]
    model, image = family.build(), family.image(0)
    model.config.vision_aspect_ratio = "anyres_max_2"
    image.ids = [IMAGE] * (16 + 5 * 6) + [7]
    inputs = family.batch([[text(3), image, text(4)]])
    with torch.no_grad(), tokencomp.patch(model, 0.5) as handle:
        assert model(**inputs).logits.isfinite().all()
        handle.set(tower_ratio=0.3)
        with pytest.raises(SpanError, match="tiles are interpolated to 2"):
            model(**inputs)
        model.config.vision_aspect_ratio = "anyres_max_4"  # four tiles stay what they are
        assert model(**family.batch([[family.image(0), text(4)]])).logits.isfinite().all()


def test_a_question_that_ends_in_a_dropped_token() -> None:
    family = FAMILIES["internvl"]
    model, image = family.build(), family.image(1)
    image.ids = image.ids[:-1]  # no end token: the last column is a visual token
    first = [{"tower": 0, "fraction": 0.1, "reducer": "uniform"}]
    with (
        tokencomp.patch(model, plan=first),
        pytest.raises(SpanError, match="question of sample 0 ends in the image"),
        torch.no_grad(),
    ):
        model(**family.batch([[text(3), image]]))


def test_layers_of_a_call_must_be_those_of_the_config() -> None:
    family = FAMILIES["llava"]
    model = family.build()
    inputs = family.batch([[text(3), family.image(), text(4)]])
    with (
        tokencomp.patch(model, 0.5, tower_ratio=0.3),
        pytest.raises(OptionError, match="vision_feature_layer=-1 in a call"),
    ):
        model(**inputs, vision_feature_layer=-1)
