"""Parts of a conversation on one cache equal one prompt; evictions equal a staircase mask."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch
from support import oracle, plans, staircase, tower
from support.families import FAMILIES, IMAGE, VIDEO, Family, text
from support.family.hybrid import HYBRID
from support.screens import THRESHOLD, Screen, TiledScreen
from torch import Tensor, nn

import tokencomp
from tokencomp.errors import (
    OptionError,
    SessionError,
    UnsupportedCacheError,
    UnsupportedModelError,
)
from tokencomp.session.conversation import Conversation
from tokencomp.session.evict import evict, held_columns

ALL = {**FAMILIES, **HYBRID}
NAMES = ("qwen2_vl", "qwen3_vl", "qwen3_5", "llava_onevision")
EVICTED = ("qwen2_vl", "qwen3_vl", "llava_onevision")
Parts = list[list[Any]]
Cell = tuple[int, int, int]


def parts_of(family: Family) -> Parts:
    torch.manual_seed(3)
    return [
        [text(4, 1)],
        [family.video(4), text(2, 7)],
        [text(3, 2)],
        [family.image(0), text(1, 4)],
        [family.video(4), text(2, 5)],
        [text(5, 3)],
    ]


def part(family: Family, row: list[Any]) -> dict[str, Tensor]:
    inputs = family.batch([row])
    inputs.pop("attention_mask")
    return inputs


def whole(family: Family, parts: Parts) -> dict[str, Tensor]:
    return family.batch([[x for row in parts for x in row]])


def one_prompt(model: nn.Module, family: Family, parts: Parts) -> Tensor:
    inputs = whole(family, parts)
    with torch.no_grad():
        return model(**inputs, position_ids=family.positions(model, inputs)).logits[:, -1]


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


@pytest.mark.parametrize("ratio", [None, 0.0, 0.5, 0.75])
@pytest.mark.parametrize("name", NAMES)
def test_parts_equal_one_prompt(name: str, ratio: float | None) -> None:
    family = ALL[name]
    model, parts = family.build(), parts_of(family)
    if ratio is not None:
        tokencomp.patch(model, ratio, reducer="kcenter")
    conversation = Conversation(model, None, "oldest")
    for row in parts:
        logits = conversation.add(part(family, row))
    expected = one_prompt(model, family, parts)
    assert difference(logits, expected) < 1e-5
    assert difference(logits, one_prompt(model, family, [parts[0], *parts[2:]])) > 1e-3
    assert conversation.rows < conversation.tokens or not ratio


@pytest.mark.parametrize("merge", ["auto", True])
@pytest.mark.parametrize("name", ["qwen3_vl", "llava_onevision"])
def test_merged_parts_equal_one_prompt(name: str, merge: Any) -> None:
    """A merged token takes one row, as a kept one of which the rest is dropped."""
    family = FAMILIES[name]
    model, parts = family.build(), parts_of(family)

    def talk(merge: Any) -> tuple[Tensor, int]:
        tokencomp.patch(model, 0.5, reducer="kcenter", merge=merge)
        conversation = Conversation(model, 1000, "oldest")
        for row in parts:
            logits = conversation.add(part(family, row))
            assert len(conversation._held or ()) == conversation.rows
        return logits, conversation.rows

    (dropped, few), (merged, rows) = talk(False), talk(merge)
    assert rows == few and difference(merged, dropped) > 1e-4
    assert difference(merged, one_prompt(model, family, parts)) < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_a_reducer_sees_the_chunk_before(name: str) -> None:
    """Chunks one by one keep the tokens that one prompt keeps; without the memory they do not."""
    family = ALL[name]
    model, kinds = family.build(), ("video", "image", "video", "video", "image")
    torch.manual_seed(3)
    media = [getattr(family, kind)(*([4] if kind == "video" else [])) for kind in kinds]
    parts: Parts = [[text(3, i), medium, text(2, 9)] for i, medium in enumerate(media)]
    tokencomp.patch(model, 0.5, reducer="timechat")
    conversation = Conversation(model, None, "oldest")
    for row in parts:
        logits = conversation.add(part(family, row))
    assert difference(logits, one_prompt(model, family, parts)) < 1e-5
    tokencomp.patch(model, 0.5, reducer="evs")
    assert difference(logits, one_prompt(model, family, parts)) > 1e-4


@pytest.mark.parametrize("setting", [None, 0.0, 0.5, "both", plans.MERGED])
@pytest.mark.parametrize("name", EVICTED)
def test_eviction_equals_a_staircase_mask(name: str, setting: Any) -> None:
    """Two evictions; the second takes rows of every age, and layers may hold different ones.

    With a merged row goes all that it represents.
    """
    family = FAMILIES[name]
    model, parts, log = family.build(), parts_of(family), staircase.Log()
    merged = oracle.MergedTurns() if setting == "merged" else None
    if setting is not None:
        plan = plans.make(setting, 4) if isinstance(setting, str) else None
        kcenter = {"ratio": setting, "reducer": "kcenter"}
        handle = tokencomp.patch(model, **({"plan": plan} if plan else kcenter))
    conversation = Conversation(model, None, "oldest")
    for i, row in enumerate(parts):
        before = conversation.tokens
        logits = conversation.add(part(family, row))
        log.added(conversation.cache, conversation.tokens)
        if merged is not None and i in (1, 3, 4):
            merged.add(handle, before)
        if i in (1, 3):
            held = held_columns(conversation.cache.layers[0])[0]
            gone = held[5:11] if i == 1 else held[6::3]
            assert evict(conversation.cache, gone) == len(gone)
            log.evicted(conversation.cache, conversation.tokens)
    if setting is not None:
        handle.remove()
    inputs = whole(family, parts)
    assert difference(logits, staircase.logits(model, family, inputs, log, merged)) < 1e-5
    plain = log.without_evictions()
    assert difference(logits, staircase.logits(model, family, inputs, plain, merged)) > 1e-3
    if merged is not None:
        assert difference(logits, staircase.logits(model, family, inputs, log)) > 1e-3


@pytest.mark.parametrize("policy", [pytest.param("oldest", marks=pytest.mark.long), "redundant"])
def test_150_chunks_at_constant_rows(policy: str) -> None:
    """Rows never exceed the budget between calls, and the last answer is that of the staircase."""
    family, budget, log, parts = FAMILIES["qwen3_vl"], 120, staircase.Log(), []
    model = family.build()
    handle = tokencomp.patch(model, 0.5, reducer="kcenter")
    conversation = Conversation(model, budget, policy)
    torch.manual_seed(5)
    for i in range(150):
        parts.append([family.video(2) if i else text(4, 1)])
        logits = conversation.add(part(family, parts[-1]))
        log.added(conversation.cache, conversation.tokens)
        conversation.shrink()
        log.evicted(conversation.cache, conversation.tokens)
        assert conversation.rows <= budget
        assert held_columns(conversation.cache.layers[0])[0, :4].tolist() == [0, 1, 2, 3]
    assert conversation.rows == budget and conversation.tokens > 15 * budget
    parts.append([text(3, 9)])
    logits = conversation.add(part(family, parts[-1]))
    handle.remove()
    expected = staircase.logits(model, family, whole(family, parts), log)
    assert difference(logits, expected) < 1e-5


@pytest.mark.parametrize("reducer", ["kcenter", "timechat", "delta"])
@pytest.mark.parametrize("name", ["qwen3_vl", "qwen3_5"])
def test_a_mark_forgets_what_came_after(name: str, reducer: str) -> None:
    """Frames too, with which `timechat` and `delta` compare those that follow."""
    family = ALL[name]
    model, parts = family.build(), parts_of(family)
    tokencomp.patch(model, None if reducer == "delta" else 0.5, reducer=reducer)
    conversation = Conversation(model, None, "oldest")
    for row in parts[:3]:
        conversation.add(part(family, row))
    rewind = conversation.mark()
    for row in parts[3:]:
        first = conversation.add(part(family, row))
    rewind()
    for row in parts[3:]:
        second = conversation.add(part(family, row))
    assert torch.equal(first, second)


@pytest.mark.parametrize("reducer", ["kcenter", "timechat", "delta"])
@pytest.mark.parametrize("name", ["qwen2_vl", "qwen3_5"])
def test_nothing_is_lost_by_a_failure(name: str, reducer: str) -> None:
    """A part that fails in the last layer leaves the conversation as it was."""
    family = ALL[name]
    model, parts = family.build(), parts_of(family)
    parts += [parts[1], parts[3]]  # the same pictures again
    tokencomp.patch(model, None if reducer == "delta" else 0.5, reducer=reducer)
    conversation = Conversation(model, None, "oldest")
    layer = family.decoder(model).layers[-1]
    for i, row in enumerate(parts):
        if i in (0, 3, 6):
            failing = layer.register_forward_hook(lambda *args: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                conversation.add(part(family, row))
            failing.remove()
        logits = conversation.add(part(family, row))
    assert difference(logits, one_prompt(model, family, parts)) < 1e-5


@pytest.mark.parametrize(("name", "frames"), [("qwen2_vl", 16), ("qwen2_5_vl", 8)])
def test_clips_that_last_longer_than_they_are_wide_are_refused(name: str, frames: int) -> None:
    """Also after a short one: text after them begins before their last frame. Pieces are exact."""
    family = FAMILIES[name]
    model = family.build()
    torch.manual_seed(3)
    long, parts = [family.video(frames), text(2, 7)], [[text(4, 1), family.video(4)]]
    parts += [[family.video(4)] for _ in range(frames // 4)] + [[text(2, 7)]]
    conversation = Conversation(model, None, "oldest")
    logits = conversation.add(part(family, parts[0]))
    held = conversation.tokens, conversation.rows
    with pytest.raises(UnsupportedModelError, match="after its largest position"):
        conversation.add(part(family, long))
    assert (conversation.tokens, conversation.rows) == held
    for row in parts[1:]:
        logits = conversation.add(part(family, row))
    assert difference(logits, one_prompt(model, family, parts)) < 1e-5


def test_batches_are_refused() -> None:
    family = FAMILIES["qwen2_vl"]
    conversation = Conversation(family.build(), None, "oldest")
    with pytest.raises(SessionError, match="one conversation, and this part has 2"):
        conversation.add({"input_ids": torch.ones(2, 4, dtype=torch.long)})


@pytest.mark.parametrize(
    ("name", "match"),
    [("qwen3_5", "linear attention"), ("gemma3", "attention window")],
)
def test_eviction_is_refused_where_it_is_not_exact(name: str, match: str) -> None:
    with pytest.raises(UnsupportedModelError, match=match):
        Conversation(ALL[name].build(), 100, "oldest")


def test_eviction_is_refused_where_queries_count_rows() -> None:
    model = FAMILIES["qwen2_vl"].build()
    model.config.text_config.attn_temperature_tuning = True
    with pytest.raises(UnsupportedModelError, match="number of their row"):
        Conversation(model, 100, "oldest")


def test_images_that_see_themselves_are_refused() -> None:
    """transformers lets no image of a later turn see all of itself, see test_layer_types.py."""
    family = HYBRID["gemma3"]
    conversation = Conversation(family.build(), None, "oldest")
    conversation.add(part(family, [text(4, 1)]))
    with pytest.raises(UnsupportedModelError, match="see each other"):
        conversation.add(part(family, [family.image(0), text(2, 7)]))
    assert conversation.tokens == conversation.rows == 4


@pytest.mark.parametrize("size", [0, 1])
def test_ragged_caches_are_refused(size: int) -> None:
    """Also where the samples are equally long and hold other patches."""
    family = FAMILIES["qwen2_vl"]
    model = family.build()
    rows = [[text(3), family.image(0), text(4)], [text(3), family.image(size), text(4)]]
    inputs = family.batch(rows)
    inputs["pixel_values"] = torch.randn_like(inputs["pixel_values"])
    with tokencomp.patch(model, 0.5, reducer="kcenter"), torch.no_grad():
        out = model(**inputs, use_cache=True)
        cache = getattr(out, "cache", None) or out.past_key_values
        with pytest.raises(UnsupportedCacheError, match="different rows"):
            evict(cache, torch.tensor([3]))


def test_the_last_row_stays() -> None:
    family = FAMILIES["qwen2_vl"]
    conversation = Conversation(family.build(), None, "oldest")
    conversation.add(part(family, [text(4, 1)]))
    with pytest.raises(OptionError, match="no row in a layer"):
        evict(conversation.cache, torch.arange(4))
    assert conversation.rows == 4


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen3_5"])
def test_steps_of_an_agent_add_what_changed(name: str) -> None:
    """Twelve screens, of which one cell changes at a time, as one prompt of them."""
    family = ALL[name]
    model, screen = family.build(), Screen(family, family.image(0))
    parts: Parts = [[screen.first, text(2)]]
    parts += [[screen.show({i % 16}), text(3, i)] for i in range(11)]
    with tokencomp.patch(model, reducer="delta", threshold=8):
        expected, rows = one_prompt(model, family, parts), []
        conversation = Conversation(model, None, "oldest")
        for row in parts:
            logits = conversation.add(part(family, row))
            rows.append(conversation.rows)
    assert difference(logits, expected) < 1e-5
    assert rows == [16 + 2 + 2 + 6 * i for i in range(12)]  # a cell, two marks, and text


@pytest.mark.parametrize("reducer", ["timechat", "delta"])
def test_what_was_evicted_is_kept_again(reducer: str) -> None:
    """The same picture twice, with and without an eviction in between."""
    family = FAMILIES["qwen2_vl"]
    model, screen = family.build(), Screen(family, family.image(0), noise=0)
    parts: Parts = [[text(2), media, text(3)] for media in (screen.first, screen.show(set()))]

    def talk(handle: Any, gone: list[int]) -> list[list[int]]:
        """Offsets that are kept of both pictures."""
        conversation, kept = Conversation(model, None, "oldest"), []
        for row in parts:
            conversation.add(part(family, row))
            kept += (handle.stats.kept(0) or [handle.stats.tower_kept(0)])[-1]
            if gone and len(kept) == 1:
                columns = torch.tensor(gone) + handle.stats.spans[0][0].start
                assert evict(conversation.cache, columns) == len(gone)
        return kept

    with tokencomp.patch(model, None if reducer == "delta" else 0.5, reducer=reducer) as handle:
        first, second = talk(handle, [])
        gone = [offset for offset in first if offset not in second][:3]
        _, again = talk(handle, gone)
    assert len(gone) == 3 and {*gone} <= {*again}
    assert reducer == "timechat" or again == gone


@pytest.mark.parametrize("name", ["internvl", "smolvlm", "llava_onevision"])
def test_after_an_eviction_a_screen_of_tiles_lacks_nothing(name: str) -> None:
    """It keeps what changed and what no row shows any more, and of every tile a cell."""
    family = FAMILIES[name]
    model, screen = family.build(), TiledScreen(family, family.image(0))
    shown: dict[int, int] = {}  # the column that shows a cell
    evicted = 0
    with tokencomp.patch(model, reducer="delta", threshold=THRESHOLD) as handle:
        conversation = Conversation(model, screen.cells + 30, "oldest")
        for media in [screen.first, *(screen.show({i, 2 * i}) for i in range(12))]:
            start, expected = conversation.tokens, {*media.kept}
            held = held_columns(conversation.cache.layers[0])[0].tolist() if start else []
            expected |= {cell for cell in range(screen.cells) if shown.get(cell) not in held}
            conversation.add(part(family, [media, text(2)]))
            spans, kept = handle.stats.spans[0], handle.stats.tower_kept(0)
            columns = [
                start + s.start + o for s in spans for o in range(s.length) if o not in s.special
            ]
            left = {start + s.start + o for s, own in zip(spans, kept, strict=True) for o in own}
            found = {cell for cell, column in enumerate(columns) if column in left}
            lost = {screen.places[cell][0] for cell in expected - {*media.kept}}
            firsts = {c for c in media.kept if screen.places[c][0] in lost}  # need not be kept
            assert expected - firsts <= found <= expected
            shown |= {cell: columns[cell] for cell in found}
            evicted += conversation.shrink()
    assert evicted > screen.cells // 2


@pytest.mark.parametrize(("policy", "budget"), [("oldest", 70), ("redundant", 40)])
@pytest.mark.parametrize("name", ["qwen2_vl", "qwen3_vl"])
def test_a_full_session_holds_all_of_the_newest_screen(name: str, policy: str, budget: int) -> None:
    """Screens of two sizes and frames, of which random cells change, far past the budget.

    A cell is known by its kind, its place, and how often it has changed. What is kept of a picture
    are the cells that no row holds, and an eviction takes no row that the picture needs.
    """
    family, log, chance = FAMILIES[name], staircase.Log(), random.Random(2)
    model = family.build()
    media = family.image(0), family.image(1), family.video(4)
    kinds = [Screen(family, first, noise=0) for first in media]
    changes = [[0] * len(screen.last) for screen in kinds]
    parts: Parts = [[text(4)]]
    shown: list[tuple[int, list[list[Cell]]]] = []
    cells: dict[int, Cell] = {}  # by column
    rows, seen = set[Cell](), [list[bool](), list[bool]()]  # of the tower: images, videos
    with tokencomp.patch(model, reducer="delta", threshold=THRESHOLD):
        conversation = Conversation(model, budget, policy)
        conversation.add(part(family, parts[0]))
        log.added(conversation.cache, conversation.tokens)
        for step in range(40):
            kind = (0, 1, 2)[step] if step < 3 else chance.choice([0, 0, 0, 1, 2])
            places, frames = range(len(changes[kind])), 2 if kind == 2 else 1
            steps = [set(chance.sample(places, chance.randrange(4))) for _ in range(frames)]
            steps[0] = steps[0] if step > 2 else set(places)
            pictures, kept = list[list[Cell]](), []
            for changed in steps:
                for place in changed:
                    changes[kind][place] += 1
                pictures.append([(kind, place, changes[kind][place]) for place in places])
                kept += [cell not in rows for cell in pictures[-1]]
                rows |= {*pictures[-1]}
            kept[0] |= not any(kept)
            seen[kind == 2] += kept
            parts.append([kinds[kind].show(*steps)])
            start, inputs = conversation.tokens, part(family, parts[-1])
            conversation.add(inputs)
            log.added(conversation.cache, conversation.tokens)
            ids = inputs["input_ids"][0]
            columns = (start + ((ids == IMAGE) | (ids == VIDEO)).nonzero()[:, 0]).tolist()
            new = zip(columns, itertools.chain(*pictures), kept, strict=True)
            cells |= {column: cell for column, cell, stays in new if stays}
            held = held_columns(conversation.cache.layers[0])[0].tolist()
            assert {*held} & {*columns} == {*cells} & {*columns}
            conversation.shrink()
            log.evicted(conversation.cache, conversation.tokens)
            held = held_columns(conversation.cache.layers[0])[0].tolist()
            rows = {cells[column] for column in held if column in cells}
            assert len(held) <= budget and rows >= {*pictures[-1]}
            shown.append((kind, pictures))
            for k in range(3) if policy == "oldest" else ():
                complete = [rows >= {*itertools.chain(*p)} for own, p in shown if own == k]
                assert complete == sorted(complete)  # older ones are lost first
        parts.append([text(3, 9)])
        logits = conversation.add(part(family, parts[-1]))
    assert sum(map(sum, seen)) < 0.4 * sum(map(len, seen))
    masks = [torch.tensor(flags).repeat_interleave(4) for flags in seen]
    with tower.tower_masks(model, masks, 0):
        expected = staircase.logits(model, family, whole(family, parts), log)
    assert difference(logits, expected) < 1e-5
