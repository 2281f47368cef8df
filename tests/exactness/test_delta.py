"""Cells that repeat what was kept leave before the tower: exactly those, and exactly."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from support import oracle, tower
from support.families import FAMILIES, Family, text
from support.prompts import pack
from support.screens import PACKED, THRESHOLD, Screen, Shown, TiledScreen, of_family
from torch import Tensor, nn
from transformers import Qwen3VLForConditionalGeneration

import tokencomp
from tokencomp import Plan, Stage, TowerStage, make_reducer
from tokencomp.errors import OptionError, SpanError, TokenCompError

FAMILY_NAMES = ["qwen3_5", *sorted(set(FAMILIES) - {"qwen3_vl_moe"})]
MEDIA_BY_BEAM = hasattr(Qwen3VLForConditionalGeneration, "_get_image_nums_and_video_nums")
RANDOM = make_reducer("random")
DELTA = TowerStage(0, 1.0, make_reducer("delta", threshold=THRESHOLD))


def screens(family: Family) -> list[list[Any]]:
    """Ragged rows of pictures and a video, of which it is known which cells stay.

    The first picture is the same in both samples, so that a sample that saw the other would keep
    nothing of it.
    """
    a, b, v = of_family(family)
    first = [
        text(3), a.first, text(2, 2), a.show({3}), text(2),
        b.show({*range(b.cells)}) if b is a else b.first,
        text(2), a.show(set()), text(5), b.show({1, 6}), text(3, 4),
    ]  # fmt: skip
    whole = {*range(v.cells)}
    video = v.frames > 1
    shown = [v.show(whole, {2, 3}), v.show({1}, {0})] if video else [v.show(whole), v.show({1})]
    return [first, [a.first, text(3, 5), *joined(shown), text(4)], [text(9, 6)]]


def joined(shown: list[Shown]) -> list[Any]:
    """With text after every one."""
    return [part for media in shown for part in (media, text(2))]


def kept_of(row: list[Any]) -> list[int]:
    """The cells that stay, counted over all media of a row."""
    media = [part for part in row if isinstance(part, Shown)]
    firsts = itertools.accumulate((m.cells for m in media), initial=0)
    return [first + cell for first, m in zip(firsts, media, strict=False) for cell in m.kept]


def cells_of(stats: Any, sample: int) -> list[int]:
    """The cells that the tower has kept, counted over all media of a sample."""
    found, first = [], 0
    for span, offsets in zip(stats.spans[sample], stats.tower_kept(sample), strict=True):
        patches = (~span.special_mask()).nonzero()[:, 0].tolist()
        found += [first + patches.index(offset) for offset in offsets if offset in patches]
        first += len(patches)
    return found


def test_exactly_the_cells_that_changed_are_kept(family: Family) -> None:
    model, rows = family.build(), screens(family)
    with tokencomp.patch(model, reducer="delta", threshold=THRESHOLD) as handle, torch.no_grad():
        model(**family.batch(rows))
        stats = handle.stats
    assert [cells_of(stats, b) for b in range(3)] == [kept_of(row) for row in rows]
    left = [
        sum(n - span.special_mask().sum() + len(span.text) for n, span in zip(*row, strict=True))
        for row in zip(stats.entering, stats.spans, strict=True)
    ]
    assert left == [len(kept_of(row)) for row in rows]


def test_samples_with_pictures_and_clips_do_not_see_each_other(family: Family) -> None:
    """The tower takes all pictures of a batch, then all clips; here those of both are equal."""
    a, _, v = of_family(family)
    rows = [[text(3), a.first, text(2), v.first, text(n)] for n in (4, 6)]
    model = family.build()
    with tokencomp.patch(model, reducer="delta", threshold=THRESHOLD) as handle, torch.no_grad():
        model(**family.batch(rows))
        assert [cells_of(handle.stats, b) for b in (0, 1)] == [kept_of(row) for row in rows]


def reads_of(rows: list[list[Any]]) -> list[Tensor]:
    """Per call of the tower (pictures, then videos), which patches it sees of every picture."""
    media = [part for row in rows for part in row if isinstance(part, Shown)]
    kinds = [[m for m in media if ("pixel_values_videos" in m.inputs) == video] for video in (0, 1)]
    return [torch.cat([m.read for m in kind]) for kind in kinds if kind]


@pytest.mark.parametrize("name", ["delta", "pixelprune"])
def test_drop_equals_mask(family: Family, name: str) -> None:
    """Prefill and every decode step; behind it, stages of the decoder drop more."""
    family = tower.deep(family)
    hybrid = family.name == "qwen3_5"
    model = tower.build(family, "eager" if hybrid else "sdpa")
    rows = screens(family) if name == "delta" else flat(family)
    later = () if hybrid else (Stage(0, 0.5, RANDOM), Stage(2, 0.2, RANDOM))
    plan = Plan(later, TowerStage(0, 1.0, make_reducer(name, threshold=THRESHOLD)))
    inputs = tower.like(model, family.batch(rows))
    if not hybrid:
        seen = None if family.name in PACKED else reads_of(rows)
        tower.check_drop_equals_mask(family, model, inputs, plan, seen=seen)
        return
    seen = tower.rows_after(model, inputs, plan)
    _, out, masks = oracle.generated(model, family, inputs, 4, plan=plan)
    with tower.tower_masks(model, seen, 0):
        found = oracle.deviation(model, family, inputs, out, masks)
    assert found < tower.TOLERANCE["eager"]


def flat(family: Family) -> list[list[Any]]:
    a, *_ = of_family(family)
    return [[text(3), a.plain(), text(3)], [a.plain(), text(4), a.plain(), text(2)], [text(9, 6)]]


def test_pixelprune_keeps_what_is_not_predicted(family: Family) -> None:
    model, rows = family.build(), flat(family)
    with tokencomp.patch(model, reducer="pixelprune", threshold=4) as handle, torch.no_grad():
        model(**family.batch(rows))
        assert [cells_of(handle.stats, b) for b in range(3)] == [kept_of(row) for row in rows]


@pytest.mark.parametrize("setting", [dict(ratio=0.75, reducer="delta"), dict(budget=4)])
@pytest.mark.parametrize("name", [*PACKED[:3], "llava"])
def test_a_ratio_or_budget_shortens_what_is_left(name: str, setting: dict[str, Any]) -> None:
    """A quarter of every picture at most: a whole one loses most, one that changed little none."""
    family = FAMILIES[name]
    model, rows = family.build(), screens(family)
    setting = {"reducer": "delta", "threshold": THRESHOLD, "then": "uniform", **setting}
    with tokencomp.patch(model, **setting) as handle, torch.no_grad():
        assert model(**family.batch(rows)).logits.isfinite().all()
        stats = handle.stats
        shown = [part for part in rows[0] if isinstance(part, Shown)]
    share = [m.cells // 4 if "ratio" in setting else 4 for m in shown]
    counts = [min(len(m.kept), n) for m, n in zip(shown, share, strict=True)]
    assert [count[-1] for count in stats.counts[0]] == counts


# -- turns ----------------------------------------------------------------------------------------


def turns(family: Family) -> list[list[Any]]:
    """Three turns with a picture each."""
    a, *_ = of_family(family)
    return [
        [text(3), a.first, text(5, 3)],
        [text(2, 9), a.show({3, 7}), text(4)],
        [text(2, 8), a.show({7}), text(4, 3)],
    ]


def test_turns_on_a_cache_equal_one_prompt(family: Family) -> None:
    """Every turn drops what the turns before it show."""
    model, rows = family.build(), turns(family)
    both = family.batch([[part for row in rows for part in row]])
    positions = family.positions(model, both)
    with tokencomp.patch(model, plan=Plan((), DELTA)) as handle, torch.no_grad():
        expected = model(**both, position_ids=positions).logits[:, -1]
        assert cells_of(handle.stats, 0) == kept_of([part for row in rows for part in row])
        cache = None
        for i in range(3):
            out = _turn(model, family, rows[: i + 1], positions, cache)
            cache = oracle.cache_of(out)
            assert cells_of(handle.stats, 0) == kept_of(rows[i])
    assert oracle.difference(out.logits[:, -1], expected) < 1e-5


@pytest.mark.parametrize("clip_first", [False, True])
def test_pictures_are_not_compared_with_clips_of_earlier_turns(clip_first: bool) -> None:
    """A clip of two steps that are both the picture, of one size: the second step is dropped."""
    family = FAMILIES["qwen2_vl"]
    model, picture, clip = family.build(), family.image(1), family.video(4)
    clip.inputs["pixel_values_videos"] = picture.inputs["pixel_values"].repeat(2, 1)
    media = [clip, picture] if clip_first else [picture, clip]
    rows = [[text(3), media[0], text(5, 3)], [text(2), media[1], text(4)]]
    both = family.batch([[part for row in rows for part in row]])
    positions = family.positions(model, both)
    with tokencomp.patch(model, plan=Plan((), DELTA)) as handle, torch.no_grad():
        cache = oracle.cache_of(_turn(model, family, rows[:1], positions))
        assert cells_of(handle.stats, 0) == [*range(8)]
        _turn(model, family, rows, positions, cache)
        assert cells_of(handle.stats, 0) == [*range(8)]


@pytest.mark.parametrize("name", ["llava", "smolvlm"])
def test_padding_of_the_tower_changes_no_later_choice(name: str) -> None:
    """By the attention of the tower, from the class token or the mean over all patches.

    A picture of one turn has no padding, and in one prompt with a whole picture it has.
    """
    family = tower.deep(FAMILIES[name])
    model = tower.build(family)
    setting = dict(reducer="delta", threshold=THRESHOLD, then="visionzip")
    for i in range(5):
        a = of_family(family)[0]
        changed = a.show({i, 3 + i, 5 + i, 6 + i, 9 + i, 10 + i})
        rows = [[text(3), a.first, text(5, 3)], [changed, text(4)]]
        with tokencomp.patch(model, 0.8, **setting) as handle, torch.no_grad():
            both = tower.like(model, family.batch([[part for row in rows for part in row]]))
            model(**both)
            together, positions = handle.stats.kept(0)[-1], family.positions(model, both)
            handle.set(ratio=0.0)  # the cache holds all of the first picture
            cache = oracle.cache_of(_turn(model, family, rows[:1], positions))
            handle.set(ratio=0.8)
            _turn(model, family, rows, positions, cache)
            alone = handle.stats.kept(0)[-1]
        assert together[-len(alone) :] == alone


def _turn(
    model: nn.Module, family: Family, rows: list[list[Any]], positions: Tensor, cache: Any = None
) -> Any:
    """The last of some turns, on the cache of those before it."""
    turn = tower.like(model, family.batch([rows[-1]]))
    before = sum(family.batch([row])["input_ids"].shape[1] for row in rows[:-1])
    stop = before + turn["input_ids"].shape[1]
    turn["attention_mask"] = torch.ones(1, stop, dtype=torch.long)
    turn["position_ids"] = positions[..., before:stop]
    return model(**turn, past_key_values=cache, use_cache=True)


def test_tiles_of_vila_are_compared_with_the_same_tile() -> None:
    """Of the only image of a prompt, if the checkpoint cuts it."""
    family = FAMILIES["vila"]
    model, a = family.build(), TiledScreen(family, family.image(1))
    model.config.image_aspect_ratio = "dynamic"
    rows = [[text(3), a.first, text(5, 3)], [text(2), a.show({3, 20}), text(4)]]
    positions = family.positions(model, family.batch([[part for row in rows for part in row]]))
    with tokencomp.patch(model, plan=Plan((), DELTA)) as handle, torch.no_grad():
        cache = oracle.cache_of(_turn(model, family, rows[:1], positions))
        _turn(model, family, rows, positions, cache)
        assert cells_of(handle.stats, 0) == [3, 20]


@pytest.mark.parametrize("cut_picture", [False, True])
def test_a_cut_cache_knows_the_pictures_that_it_holds(cut_picture: bool) -> None:
    """Text as long as what was cut away comes before the next picture."""
    family = FAMILIES["qwen2_vl"]
    model, a = family.build(), Screen(family, family.image(0))
    rows = [
        [text(3), a.first, text(5, 3)],
        [text(2, 9), a.show({*range(16)}), text(4)],
        [text(2, 8), a.show({7}), text(4, 3)],
    ]
    positions = family.positions(model, family.batch([[part for row in rows for part in row]]))
    lengths = [family.batch([row])["input_ids"].shape[1] for row in rows]
    removed = lengths[1] if cut_picture else 2
    with tokencomp.patch(model, plan=Plan((), DELTA)) as handle, torch.no_grad():
        cache = None
        for i in (0, 1):
            cache = oracle.cache_of(_turn(model, family, rows[: i + 1], positions, cache))
        cache.crop(-removed)
        at = positions[..., sum(lengths[:2]) - removed : sum(lengths[:2])]
        model(torch.full((1, removed), 11), past_key_values=cache, position_ids=at, use_cache=True)
        _turn(model, family, rows, positions, cache)
        assert handle.stats.tower_kept(0) == [list(range(16)) if cut_picture else [7]]


def test_batch_equals_singles_with_beams(family: Family) -> None:
    model, rows = family.build(), screens(family)
    options = dict(num_beams=2, num_return_sequences=2)
    if MEDIA_BY_BEAM and not family.name.startswith("qwen2"):
        pytest.skip("these releases mix the media of a prompt when they repeat it for beams")
    with tokencomp.patch(model, plan=Plan((Stage(0, 0.5, RANDOM),), DELTA)):
        batch = oracle.generate(model, family.batch(rows), **options)
        for b, row in enumerate(rows):
            single = oracle.generate(model, family.batch([row]), **options)
            assert torch.equal(batch.sequences[2 * b : 2 * b + 2, -8:], single.sequences[:, -8:])


# -- what is refused ------------------------------------------------------------------------------


def test_prompts_that_share_a_row_are_refused() -> None:
    family = FAMILIES["qwen2_vl"]
    model, rows = family.build(), screens(family)
    with tokencomp.patch(model, reducer="delta"), pytest.raises(OptionError, match="one prompt"):
        model(**pack(family, model, rows), use_cache=False)


def test_padding_under_gradient_checkpointing_is_refused() -> None:
    """The backward pass would not hide it."""
    family = FAMILIES["internvl"]
    model, inputs = family.build().train(), family.batch(screens(family))
    with tokencomp.patch(model, reducer="delta", threshold=THRESHOLD):
        model(**inputs, use_cache=False).logits[:, -1].sum().backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        assert grads and all(grad.isfinite().all() for grad in grads)
        model.gradient_checkpointing_enable()
        with pytest.raises(OptionError, match="gradient checkpointing with reducer 'delta'"):
            model(**inputs, use_cache=False)
        tower.tower_of(model).gradient_checkpointing_disable()
        model(**inputs, use_cache=False).logits[:, -1].sum().backward()


@pytest.mark.parametrize(
    "setting",
    [
        dict(ratio=0.5, tower_ratio=0.5, reducer="delta"),
        dict(ratio=0.5, tower_ratio=0.5, tower_reducer="delta"),
        dict(reducer="delta", then="pixelprune"),
        dict(reducer="delta", then="uniform"),
        dict(reducer="delta", merge=True),
        dict(reducer="delta", threshold=256),
    ],
)
def test_settings_without_a_meaning_are_refused(setting: dict[str, Any]) -> None:
    with pytest.raises(TokenCompError, match=r"delta|threshold"):
        tokencomp.patch(FAMILIES["qwen2_vl"].build(), **setting)


@pytest.mark.parametrize("options", [dict(then="uniform"), dict(merge=True)])
def test_options_of_a_ratio_wait_for_the_next_one(options: dict[str, Any]) -> None:
    model = FAMILIES["qwen2_vl"].build()
    with tokencomp.patch(model, 0.5, reducer="delta", **options) as handle:
        plan = handle.plan
        assert handle.set(ratio=0.0).set(ratio=0.5).plan == plan
        handle.set(ratio=0.0)
        with pytest.raises(OptionError, match="has no effect without a ratio"):
            handle.set(**options)


def test_pictures_without_a_prompt_are_refused() -> None:
    family = FAMILIES["qwen2_vl"]
    model, media = family.build(), family.image(0).inputs
    pixels = media["pixel_values"], media["image_grid_thw"]
    with tokencomp.patch(model, reducer="delta"), pytest.raises(SpanError, match="for no prompt"):
        model.get_image_features(*pixels)
    with tokencomp.patch(model, reducer="pixelprune"):
        model.get_image_features(*pixels)
