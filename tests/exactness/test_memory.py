"""Later pictures are compared with what the cache holds, whatever has happened to the cache.

The oracle is a fresh cache that gets the history that is true after the event: what it keeps of the
next picture, and its logits.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import oracle
from support.caches import static_cache
from support.families import FAMILIES, IMAGE, text
from support.screens import PACKED, THRESHOLD, Screen, Shown, TiledScreen
from transformers import DynamicCache

import tokencomp
from tokencomp import Plan, Stage, TowerStage, make_reducer
from tokencomp.tokens.tokens import VisualSpan

FAMILY = FAMILIES["qwen2_vl"]
PLANS = {
    "timechat": Plan((Stage(0, 0.5, make_reducer("timechat"), merge=False),)),
    "delta": Plan((), TowerStage(0, 1.0, make_reducer("delta", threshold=THRESHOLD))),
}
WHOLE = Plan((Stage(0, 0.99, make_reducer("timechat"), merge=False),))  # all 16 tokens of a picture
OTHER = Plan((Stage(0, 0.5, make_reducer("kcenter"), merge=False),))
TURN = 2 + 18 + 3  # columns


class Talk:
    """A conversation of one or several samples on one cache."""

    def __init__(self, model: Any, handle: Any, cache: Any) -> None:
        self.model, self.handle, self.cache, self.columns = model, handle, cache, 0

    def say(self, *media: Shown, words: int = 3, **changes: Any) -> Any:
        """Run a turn with a picture of every sample; returns what is kept, and the logits."""
        call = FAMILY.batch([[text(2, 7), shown, text(words, 3)] for shown in media])
        start, stop = self.columns, self.columns + call["input_ids"].shape[1]
        call["position_ids"] = FAMILY.positions(self.model, call) + start
        call["attention_mask"] = torch.ones(len(media), stop, dtype=torch.long)
        out = self.model(**{**call, **changes}, past_key_values=self.cache, use_cache=True)
        self.columns, stats = stop, self.handle.stats
        samples = range(len(stats.spans) if stats else 0)
        kept = [(stats.tower_kept(b), stats.kept(b)[-1:]) for b in samples]
        return kept, out.logits[:, -1]

    def write(self, words: int) -> None:
        """A turn of text."""
        start, stop = self.columns, self.columns + words
        positions = torch.arange(start, stop).expand(3, 1, -1)
        self.model(
            torch.full((1, words), 11), position_ids=positions, use_cache=True,
            past_key_values=self.cache, attention_mask=torch.ones(1, stop, dtype=torch.long),
        )  # fmt: skip
        self.columns = stop

    def crop(self, columns: int) -> None:
        self.cache.crop(-columns)
        self.columns -= columns


class Scene:
    """Conversations under one reducer, and pictures that follow each other."""

    def __init__(self, reducer: str, kind: str) -> None:
        self.model, self.plan, self.kind = FAMILY.build(), PLANS[reducer], kind
        self.handle = tokencomp.patch(self.model, plan=self.plan)
        self.pixels = reducer == "delta"
        screens = [Screen(FAMILY, FAMILY.image(0)) for _ in range(2)]
        changes = [{2, 5}, {1, 5, 9}, {3}]
        self.a, self.b = ([s.first, *(s.show(cells) for cells in changes)] for s in screens)

    def talk(self, *turns: tuple[Shown, ...]) -> Talk:
        """A conversation with these turns, each of a picture per sample."""
        cache = static_cache(self.model, 256) if self.kind == "static" else DynamicCache()
        talk = Talk(self.model, self.handle, cache)
        for turn in turns:
            talk.say(*turn)
        return talk

    def features(self, shown: Shown) -> dict[str, Any]:
        """Arguments of a turn whose picture comes as features."""
        call = FAMILY.batch([[text(2, 7), shown, text(3, 3)]])
        embeds = oracle.decoder_inputs(FAMILY.build(), FAMILY, call)["inputs_embeds"]
        none = dict.fromkeys(("input_ids", "pixel_values", "image_grid_thw", "mm_token_type_ids"))
        return {**none, "inputs_embeds": embeds}


# -- the cache changes -----------------------------------------------------------------------------
# Every case returns what a turn keeps with its logits, and what it should be.


def reset(s: Scene) -> tuple[Any, Any]:
    talk = s.talk((s.a[0],))
    talk.cache.reset()
    talk.columns = 0
    return talk.say(s.a[1]), s.talk().say(s.a[1])


def crop_of_a_picture(s: Scene) -> tuple[Any, Any]:
    talk, fresh = s.talk(), s.talk()
    talk.write(2)
    fresh.write(2)
    s.handle.set(plan=s.plan if s.pixels else WHOLE)
    talk.say(s.a[0])
    s.handle.set(plan=s.plan)
    talk.crop(TURN)
    return talk.say(s.a[1]), fresh.say(s.a[1])


def crop_of_text(s: Scene) -> tuple[Any, Any]:
    talk, fresh = s.talk((s.a[0],), (s.a[1],)), s.talk((s.a[0],), (s.a[1],))
    talk.write(3)
    talk.crop(3)
    return talk.say(s.a[2]), fresh.say(s.a[2])


def reorder(s: Scene) -> tuple[Any, Any]:
    talk, fresh = s.talk((s.a[0], s.b[0])), s.talk((s.b[0], s.a[0]))
    talk.cache.reorder_cache(torch.tensor([1, 0]))
    return talk.say(s.b[1], s.a[2]), fresh.say(s.b[1], s.a[2])


def select(s: Scene) -> tuple[Any, Any]:
    talk, fresh = s.talk((s.a[0], s.b[0])), s.talk((s.b[0],))
    talk.cache.batch_select_indices(torch.tensor([1]))
    return talk.say(s.b[1]), fresh.say(s.b[1])


def repeat(s: Scene) -> tuple[Any, Any]:
    talk = s.talk((s.a[0], s.b[0]))
    fresh = s.talk((s.a[0], s.a[0], s.b[0], s.b[0]))
    talk.cache.batch_repeat_interleave(2)
    turn = s.a[1], s.a[2], s.b[1], s.b[2]
    return talk.say(*turn), fresh.say(*turn)


def deepcopy(s: Scene) -> tuple[Any, Any]:
    talk, fresh = s.talk((s.a[0],)), s.talk((s.a[0],))
    other = copy.copy(talk)
    other.cache = copy.deepcopy(talk.cache)
    talk.say(s.b[0])
    return other.say(s.a[1]), fresh.say(s.a[1])


# -- a picture comes in another way ----------------------------------------------------------------
# What the next one of its size can be compared with is then unknown, as for a first picture.


def unknown(s: Scene, way: Callable[[Talk], None]) -> tuple[Any, Any]:
    talk = s.talk((s.a[0],))
    way(talk)
    return talk.say(s.a[2])[:1], s.talk().say(s.a[2])[:1]


def set_to_nothing(s: Scene) -> tuple[Any, Any]:
    def way(talk: Talk) -> None:
        s.handle.set(plan=Plan())
        talk.say(s.a[1])
        s.handle.set(plan=s.plan)

    return unknown(s, way)


def set_to_another_reducer(s: Scene) -> tuple[Any, Any]:
    def way(talk: Talk) -> None:
        s.handle.set(plan=OTHER)
        talk.say(s.a[1])
        s.handle.set(plan=s.plan)

    return unknown(s, way)


def disabled(s: Scene) -> tuple[Any, Any]:
    def way(talk: Talk) -> None:
        with s.handle.disabled():
            talk.say(s.a[1])

    return unknown(s, way)


def features_at_unknown_columns(s: Scene) -> tuple[Any, Any]:
    return unknown(s, lambda talk: talk.say(s.a[1], **s.features(s.a[1])))


def features_at_known_columns(s: Scene) -> tuple[Any, Any]:
    """`timechat` compares features, which it has of these pictures too."""
    types = (FAMILY.batch([[text(2, 7), s.a[1], text(3, 3)]])["input_ids"] == IMAGE).int()
    given = {**s.features(s.a[1]), "mm_token_type_ids": types}
    if s.pixels:
        return unknown(s, lambda talk: talk.say(s.a[1], **given))
    talk, fresh = s.talk((s.a[0],)), s.talk((s.a[0],), (s.a[1],))
    talk.say(s.a[1], **given)
    return talk.say(s.a[2]), fresh.say(s.a[2])


def embeddings_at_the_decoder(s: Scene) -> tuple[Any, Any]:
    def way(talk: Talk) -> None:
        embeds = s.features(s.a[1])["inputs_embeds"]
        talk.model.model.language_model(
            inputs_embeds=embeds, past_key_values=talk.cache, use_cache=True,
            position_ids=torch.arange(TURN, 2 * TURN).expand(3, 1, -1),
        )  # fmt: skip
        talk.columns += TURN

    return unknown(s, way)


def a_failed_prompt(s: Scene) -> tuple[Any, Any]:
    """Its picture is not taken for that of the next prompt, which has features."""
    talk, fresh = s.talk(), s.talk()
    fail = FAMILY.decoder(s.model).register_forward_pre_hook(lambda *_: 1 / 0, prepend=True)
    with pytest.raises(ZeroDivisionError):
        talk.say(s.a[0])
    fail.remove()
    types = (FAMILY.batch([[text(2, 7), s.b[0], text(3, 3)]])["input_ids"] == IMAGE).int()
    for conversation in (talk, fresh):
        conversation.say(s.b[0], **{**s.features(s.b[0]), "mm_token_type_ids": types})
    if s.pixels:
        return talk.say(s.a[1])[:1], s.talk().say(s.a[1])[:1]
    return talk.say(s.a[1]), fresh.say(s.a[1])


def a_prompt_that_failed_between_layers(s: Scene) -> tuple[Any, Any]:
    """It has written to the cache of earlier pictures."""

    def way(talk: Talk) -> None:
        rows = talk.cache.layers[0].get_seq_length()
        layer = FAMILY.decoder(s.model).layers[1]
        fail = layer.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            talk.say(s.a[1])
        fail.remove()
        talk.cache.layers[0].crop(int(rows - talk.cache.layers[0].get_seq_length()))

    return unknown(s, way)


CHANGES = [reset, crop_of_a_picture, crop_of_text, reorder, select, repeat, deepcopy]
WAYS = [
    set_to_nothing,
    set_to_another_reducer,
    disabled,
    features_at_unknown_columns,
    features_at_known_columns,
    embeddings_at_the_decoder,
    a_failed_prompt,
    a_prompt_that_failed_between_layers,
]


@pytest.mark.filterwarnings("ignore::tokencomp.errors.UncompressedWarning")
@pytest.mark.parametrize("case", [*CHANGES, *WAYS], ids=lambda case: case.__name__)
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("reducer", PLANS)
def test_a_picture_is_compared_with_what_the_cache_holds(
    reducer: str, kind: str, case: Callable[[Scene], tuple[Any, Any]]
) -> None:
    if kind == "static" and case in (select, repeat):
        pytest.skip("transformers selects and repeats the samples of dynamic caches alone")
    with torch.no_grad():
        (kept, *logits), (expected, *same) = case(Scene(reducer, kind))
    assert kept == expected
    for a, b in zip(logits, same, strict=True):
        assert oracle.difference(a, b) < 1e-5


# -- what the decoder holds ------------------------------------------------------------------------

SETTINGS: dict[str, dict[str, Any]] = {
    "budget": dict(budget=5, reducer="delta", threshold=THRESHOLD, then="uniform"),
    "merged": dict(budget=5, reducer="delta", threshold=THRESHOLD, then="kcenter", merge=True),
    "between layers": dict(
        plan=Plan((Stage(2, 0.3, make_reducer("uniform")),), PLANS["delta"].tower)
    ),
}
PICTURES = (
    "qwen2_vl",
    "qwen2_5_vl",
    "llava_onevision",
    "llava_next",
    "internvl",
    "smolvlm",
    "vila",
)


def cells_of(spans: list[VisualSpan], offsets: list[list[int]]) -> set[int]:
    """Tokens of spans, by their offsets, as numbers among the patches of all spans."""
    columns = [(i, o) for i, s in enumerate(spans) for o in range(s.length) if o not in s.special]
    kept = {(i, o) for i, own in enumerate(offsets) for o in own}
    return {cell for cell, column in enumerate(columns) if column in kept}


@pytest.mark.thin(2)
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", PICTURES)
def test_a_cell_is_shown_if_the_decoder_holds_its_row(name: str, setting: str) -> None:
    """Pictures of two samples on one cache, against a table of what was kept of every cell."""
    family, kind = FAMILIES[name], Screen if name in PACKED else TiledScreen
    model, chance = family.build(), random.Random(3)
    screens = [kind(family, family.image(0), noise=0) for _ in range(2)]
    cells = range(screens[0].cells)
    content, shown = [dict.fromkeys(cells, 0) for _ in screens], [dict[int, int]() for _ in screens]
    cache, mask, late = DynamicCache(), torch.zeros(2, 0, dtype=torch.long), 0
    with tokencomp.patch(model, **SETTINGS[setting]) as handle, torch.no_grad():
        for turn in range(6):
            rows, pictures = [], []
            for screen, now in zip(screens, content, strict=True):
                changed = set(chance.sample(cells, 4)) if turn in (1, 2, 4) else set[int]()
                pictures.append(screen.show(changed) if turn else screen.first)
                now |= {cell: turn for cell in changed}
                rows.append([text(2, 7), pictures[-1], text(chance.randrange(1, 5), 3)])
            call = family.batch(rows)
            call["position_ids"] = family.positions(model, call) + mask.shape[1]
            mask = torch.cat([mask, call["attention_mask"]], 1)
            model(**{**call, "attention_mask": mask}, past_key_values=cache, use_cache=True)
            stats = handle.stats
            for b, (now, known) in enumerate(zip(content, shown, strict=True)):
                new = {cell for cell in cells if known.get(cell) != now[cell]}
                entered = cells_of(stats.spans[b], stats.tower_kept(b))
                forced = set(pictures[b].kept) | {0}  # one of every picture or tile in any case
                assert new <= entered <= new | (forced if turn else set())
                kept = cells_of(stats.spans[b], stats.kept(b)[-1])
                assert kept <= entered
                late += sum(now[cell] < turn for cell in kept & new)  # a budget left them out
                known |= {cell: now[cell] for cell in kept}
    assert late > 5


def test_a_still_screen_under_a_budget_becomes_complete() -> None:
    """Sixteen cells in steps of six; then one token per picture."""
    model, screen = FAMILY.build(), Screen(FAMILY, FAMILY.image(0), noise=0)
    pictures = [screen.first, screen.show({*range(16)}), *(screen.show(set()) for _ in range(3))]
    setting = dict(budget=6, reducer="delta", threshold=THRESHOLD)
    with tokencomp.patch(model, **setting) as handle, torch.no_grad():
        talk, counts = Talk(model, handle, DynamicCache()), []
        for picture in pictures:
            kept, _ = talk.say(picture)
            counts.append(len(kept[0][1][0][0]))
    assert counts == [6, 6, 6, 4, 1]


def test_padding_rows_show_nothing() -> None:
    """A picture in the first column of a sample that keeps fewer rows than the other."""
    family = FAMILIES["llava"]
    model, screen = family.build(), TiledScreen(family, family.image(0), noise=0)
    cache, mask, entered = DynamicCache(), torch.zeros(2, 0, dtype=torch.long), []
    setting = dict(budget=4, reducer="delta", threshold=THRESHOLD, then="uniform")
    with tokencomp.patch(model, **setting) as handle, torch.no_grad():
        for picture in (screen.first, screen.show(set())):
            call = family.batch([[picture, text(1, 3)], [text(14, 3)]])
            call["position_ids"] = family.positions(model, call) + mask.shape[1]
            mask = torch.cat([mask, call["attention_mask"]], 1)
            model(**{**call, "attention_mask": mask}, past_key_values=cache, use_cache=True)
            entered.append(set(handle.stats.tower_kept(0)[0]))
            kept = set(handle.stats.kept(0)[-1][0])
            if len(entered) == 1:
                assert handle.stats.spans[0][0].start == 0 and 0 not in kept
                expected = set(range(screen.cells)) - kept
    assert entered[1] == expected
