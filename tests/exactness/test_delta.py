"""Cells that repeat what was kept leave before the tower: exactly those, and exactly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import oracle, tower
from support.families import FAMILIES, Family, text
from support.prompts import pack
from support.screens import THRESHOLD, Screen
from torch import Tensor, nn

import tokencomp
from tokencomp import Plan, Stage, TowerStage, make_reducer
from tokencomp.errors import OptionError, SpanError, TokenCompError

FAMILY_NAMES = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5"]
RANDOM = make_reducer("random")
DELTA = TowerStage(0, 1.0, make_reducer("delta", threshold=THRESHOLD))


def screens(family: Family) -> tuple[list[list[Any]], list[list[list[int]]]]:
    """Ragged rows of pictures and a video, and which cells of every one of them stay.

    The first picture is the same in both samples, so that a sample that saw the other would keep
    nothing of it. Of a picture in which nothing changed, the first cell stays.
    """
    whole, short = list(range(16)), list(range(8))
    a, b, v = (Screen(family, m) for m in (family.image(0), family.image(1), family.video(4)))
    first = [
        text(3), a.first, text(2, 2), a.show({3}), text(2), b.first, text(2), a.show(set()),
        text(5), b.show({1, 6}), text(3, 4),
    ]  # fmt: skip
    second = [a.first, text(3, 5), v.show(set(short), {2, 5}), text(2), v.show({4}, {0}), text(4)]
    kept = [[whole, [3], short, [0], [1, 6]], [whole, [*short, 10, 13], [4, 8]]]
    return [first, second, [text(9, 6)]], kept


def test_exactly_the_cells_that_changed_are_kept(family: Family) -> None:
    model, (rows, kept) = family.build(), screens(family)
    with tokencomp.patch(model, reducer="delta", threshold=THRESHOLD) as handle, torch.no_grad():
        model(**family.batch(rows))
        stats = handle.stats
        found = [_by_item(stats.spans[b], stats.tower_kept(b)) for b in range(3)]
        sizes = [_by_item(stats.spans[b], stats.entering[b], lengths=True) for b in range(3)]
    assert found == [*kept, []]
    assert sizes == [[len(cells) for cells in row] for row in [*kept, []]]


def _by_item(spans: Any, parts: Any, lengths: bool = False) -> list[Any]:
    """Cells of every picture or video; a video may be several spans, with special tokens."""
    items: dict[Any, Any] = {}
    for span, part in zip(spans, parts, strict=True):
        if lengths:
            items[span.item] = items.get(span.item, 0) + part
            continue
        patches = (~span.special_mask()).nonzero()[:, 0].tolist()
        cells, seen = items.setdefault(span.item, ([], [0]))
        cells += [seen[0] + patches.index(offset) for offset in part if offset in patches]
        seen[0] += len(patches)
    return [x if lengths else x[0] for x in items.values()]


@pytest.mark.parametrize("name", ["delta", "pixelprune"])
def test_drop_equals_mask(family: Family, name: str) -> None:
    """Prefill and every decode step; behind it, stages of the decoder drop more."""
    family = tower.deep(family)
    hybrid = family.name == "qwen3_5"
    model = tower.build(family, "eager" if hybrid else "sdpa")
    rows = screens(family)[0]
    if name == "pixelprune":
        rows = [[text(3), *flat(family, 0)], [*flat(family, 1), text(4)], [text(9, 6)]]
    later = () if hybrid else (Stage(0, 0.5, RANDOM), Stage(2, 0.2, RANDOM))
    plan = Plan(later, TowerStage(0, 1.0, make_reducer(name, threshold=THRESHOLD)))
    inputs = tower.like(model, family.batch(rows))
    if not hybrid:
        tower.check_drop_equals_mask(family, model, inputs, plan)
        return
    seen = tower.rows_after(model, inputs, plan)
    _, out, masks = oracle.generated(model, family, inputs, 4, plan=plan)
    with tower.tower_masks(model, seen, 0):
        found = oracle.deviation(model, family, inputs, out, masks, expect=oracle.typed_logits)
    assert found < tower.TOLERANCE["eager"]


def flat(family: Family, size: int) -> list[Any]:
    """A picture of one colour but for a cell."""
    media = family.image(size)
    pixels = torch.zeros_like(media.inputs["pixel_values"]).view(-1, 4, 96)
    pixels += 0.001 * torch.randn_like(pixels)  # rows of the tower are told apart by their values
    pixels[5] += 0.5
    media.inputs["pixel_values"] = pixels.flatten(0, 1)
    return [media, text(3)]


def test_pixelprune_keeps_what_is_not_predicted(family: Family) -> None:
    """Cell 5 of 4 × 4, the one to its right, and the one below it, which an edge predicts."""
    model = family.build()
    with tokencomp.patch(model, reducer="pixelprune", threshold=4) as handle, torch.no_grad():
        model(**family.batch([[text(3), *flat(family, 0)], [*flat(family, 0), text(2)]]))
        assert [handle.stats.tower_kept(b) for b in range(2)] == [[[0, 5, 6, 9]]] * 2


@pytest.mark.parametrize("setting", [dict(ratio=0.75, reducer="delta"), dict(budget=4)])
def test_a_ratio_or_budget_shortens_what_is_left(family: Family, setting: dict[str, Any]) -> None:
    """A quarter of every picture at most: a whole one loses most, one that changed little none."""
    model, (rows, kept) = family.build(), screens(family)
    setting = {"reducer": "delta", "threshold": THRESHOLD, "then": "uniform", **setting}
    with tokencomp.patch(model, **setting) as handle, torch.no_grad():
        assert model(**family.batch(rows)).logits.isfinite().all()
        stats = handle.stats
        counts = _by_item(stats.spans[0], [c[-1] for c in stats.counts[0]], lengths=True)
    share = [4, 4, 2, 4, 2] if "ratio" in setting else [4] * 5
    assert counts == [min(len(c), n) for c, n in zip(kept[0], share, strict=True)]


# -- turns ----------------------------------------------------------------------------------------


def turns(family: Family) -> tuple[list[list[Any]], list[list[int]]]:
    """Three turns with a picture each, and the cells of it that stay."""
    a = Screen(family, family.image(0))
    rows = [
        [text(3), a.first, text(5, 3)],
        [text(2, 9), a.show({3, 7}), text(4)],
        [text(2, 8), a.show({7}), text(4, 3)],
    ]
    return rows, [list(range(16)), [3, 7], [7]]


def test_turns_on_a_cache_equal_one_prompt(family: Family) -> None:
    """Every turn drops what the turns before it show."""
    model, (rows, kept) = family.build(), turns(family)
    both = family.batch([[part for row in rows for part in row]])
    positions = family.positions(model, both)
    with tokencomp.patch(model, plan=Plan((), DELTA)) as handle, torch.no_grad():
        expected = model(**both, position_ids=positions).logits[:, -1]
        assert handle.stats.tower_kept(0) == kept
        cache, seen = None, []
        for i in range(3):
            out = _turn(model, family, rows[: i + 1], positions, cache)
            cache = oracle.cache_of(out)
            seen += handle.stats.tower_kept(0)
    assert seen == kept
    assert oracle.difference(out.logits[:, -1], expected) < 1e-5


def _turn(
    model: nn.Module, family: Family, rows: list[list[Any]], positions: Tensor, cache: Any = None
) -> Any:
    """The last of some turns, on the cache of those before it."""
    turn = family.batch([rows[-1]])
    before = sum(family.batch([row])["input_ids"].shape[1] for row in rows[:-1])
    stop = before + turn["input_ids"].shape[1]
    turn["attention_mask"] = torch.ones(1, stop, dtype=torch.long)
    turn["position_ids"] = positions[..., before:stop]
    return model(**turn, past_key_values=cache, use_cache=True)


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
    model, rows = family.build(), screens(family)[0]
    options = dict(num_beams=2, num_return_sequences=2)
    if family.name.startswith("qwen3") and hasattr(model, "_get_image_nums_and_video_nums"):
        del rows[1]  # these releases expand two videos of a prompt in a wrong order for beams
    with tokencomp.patch(model, plan=Plan((Stage(0, 0.5, RANDOM),), DELTA)):
        batch = oracle.generate(model, family.batch(rows), **options)
        for b, row in enumerate(rows):
            single = oracle.generate(model, family.batch([row]), **options)
            assert torch.equal(batch.sequences[2 * b : 2 * b + 2, -8:], single.sequences[:, -8:])


# -- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["delta", "pixelprune"])
@pytest.mark.parametrize("family_name", sorted(set(FAMILIES) - {*FAMILY_NAMES, "qwen3_vl_moe"}))
def test_towers_of_pictures_of_one_size_refuse_it(family_name: str, name: str) -> None:
    with pytest.raises(TokenCompError, match=rf"'{name}'.*Qwen"):
        tokencomp.patch(FAMILIES[family_name].build(), reducer=name)


def test_prompts_that_share_a_row_are_refused() -> None:
    family = FAMILIES["qwen2_vl"]
    model, rows = family.build(), screens(family)[0]
    with tokencomp.patch(model, reducer="delta"), pytest.raises(OptionError, match="one prompt"):
        model(**pack(family, model, rows), use_cache=False)


def test_pictures_without_a_prompt_are_refused() -> None:
    family = FAMILIES["qwen2_vl"]
    model, media = family.build(), family.image(0).inputs
    pixels = media["pixel_values"], media["image_grid_thw"]
    with tokencomp.patch(model, reducer="delta"), pytest.raises(SpanError, match="for no prompt"):
        model.get_image_features(*pixels)
    with tokencomp.patch(model, reducer="pixelprune"):
        model.get_image_features(*pixels)


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
