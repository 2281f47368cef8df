"""A compressed cache is refused without the patch that compressed it, before any write."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from support import backends, oracle, plans
from support.caches import static_cache
from support.families import FAMILIES, Family, text
from support.family.hybrid import HYBRID, with_window
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import StaticLayer

import tokencomp
from tokencomp.errors import UnsupportedCacheError

NAMES = ["qwen2_vl", "qwen3_vl", "llava_onevision", "internvl"]
# Their bodies make masks before the decoder runs, and read the cache for that.
MASKED_BY_BODY = sorted(HYBRID.keys() & {"gemma3", "gemma4", "inkling_mm_model"})
SETTINGS: dict[str, dict[str, Any]] = {
    "entry": {"plan": plans.make("entry", 4)},
    "layers": {"plan": plans.make("layer", 4)},
    "merged": {"ratio": 0.5, "reducer": "kcenter", "merge": True},
}
GONE = "that patch is gone"


def rows(family: Family, count: int) -> list[list[Any]]:
    """`count` prompts, each longer than the one before it."""
    return [[text(3 + 4 * b), family.image(b), text(5, b)] for b in range(count)]


def rows_of(cache: Any) -> list[int]:
    """Rows that the layers with keys hold."""
    keys = [getattr(layer, "keys", None) for layer in cache.layers]
    return [k.shape[-2] for k in keys if k is not None]


class Chat:
    """A patched first turn, and the arguments and the oracle of a second one of text alone."""

    def __init__(
        self, family: Family, count: int, model: Any = None, held: Any = None, **setting: Any
    ) -> None:
        self.family, self.model = family, model or family.build()
        inputs = family.batch(rows(family, count))
        self.width, later = inputs["input_ids"].shape[1], text(4, 9)
        new = torch.tensor([later] * count)
        positions = family.positions(self.model, inputs)
        self.handle = tokencomp.patch(self.model, **setting)
        with torch.no_grad():
            own = {} if held is None else {"past_key_values": held}
            out = self.model(**inputs, position_ids=positions, use_cache=True, **own)
        self.cache, self.name = oracle.cache_of(out), oracle.cache_name(out)
        self.turn = oracle.later_turn(inputs, positions, new, out)
        self.inputs, self.new = inputs, new
        self.masks = oracle.kept_columns(self.handle, inputs, family.layers)

    def expected(self, merged: oracle.Merged | None = None) -> Tensor:
        """Logits of the masked full-length run; the model must not be patched."""
        return oracle.masked_logits(
            self.model, self.family, self.inputs, self.masks, self.new, merged
        )[:, self.width :]

    def say(self, cache: Any = None, **changes: Any) -> Tensor:
        turn = {**self.turn, **changes, self.name: cache or self.cache}
        with torch.no_grad():
            return self.model(**turn, use_cache=True).logits

    def refused(self, match: str) -> None:
        """A refusal writes nothing; neither to the cache nor to a copy of it."""
        before = rows_of(self.cache)
        for cache in (self.cache, copy.deepcopy(self.cache)):
            with pytest.raises(UnsupportedCacheError, match=match):
                self.say(cache)
            assert rows_of(cache) == before


@pytest.mark.parametrize("way", ["removed", "replaced", "off", "block", "file"])
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", [*NAMES, *MASKED_BY_BODY])
@pytest.mark.thin(5)
def test_a_cache_is_refused_without_its_patch(name: str, setting: str, way: str) -> None:
    """Also under another patch, one at ratio 0, and where a file has brought it."""
    chat = Chat({**FAMILIES, **HYBRID}[name], 1 + (setting == "entry"), **SETTINGS[setting])
    if way == "file":
        chat.cache = pickle.loads(pickle.dumps(chat.cache))
        chat.refused(GONE)
    elif way == "block":
        with tokencomp.patch(chat.model, 0.75):
            chat.refused(GONE)
        assert chat.say().isfinite().all()  # the patch is back
    else:
        if way == "removed":
            chat.handle.remove()
        else:
            tokencomp.patch(chat.model, 0.75 if way == "replaced" else 0)
        chat.refused(GONE)


@pytest.mark.thin(2)
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", NAMES)
def test_a_patch_at_ratio_0_goes_on_with_its_caches(name: str, setting: str) -> None:
    """Weights of merged tokens included."""
    chat = Chat(FAMILIES[name], 1 + (setting == "entry"), **SETTINGS[setting])
    merged = oracle.Merged(chat.handle) if setting == "merged" else None
    chat.handle.set(reducer="uniform", ratio=0, merge=False)
    found = chat.say()
    tokencomp.unpatch(chat.model)
    assert oracle.difference(found, chat.expected(merged)) < 2e-5


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("merge", [False, True])
def test_a_crop_ends_where_tokens_have_left(merge: Any, kind: str) -> None:
    """Text after media leaves and comes again; media of which tokens have left do not."""
    family = FAMILIES["qwen2_vl"]
    model, inputs = family.build(), family.batch(rows(family, 1))
    if kind == "static" and not hasattr(StaticLayer, "crop"):
        pytest.skip("static caches of this release cannot be cropped")
    cache = static_cache(model, 64) if kind == "static" else DynamicCache()
    positions = family.positions(model, inputs)
    with tokencomp.patch(model, 0.5, reducer="uniform", merge=merge), torch.no_grad():
        out = model(**inputs, position_ids=positions, past_key_values=cache, use_cache=True)
        name = oracle.cache_name(out)
        cache.crop(-3)
        last = {"input_ids": inputs["input_ids"][:, -3:], "position_ids": positions[..., -3:]}
        again = model(**last, **{name: cache}, use_cache=True).logits
        length = int(cache.get_seq_length())
        with pytest.raises(UnsupportedCacheError, match="reaches into media"):
            cache.crop(5 - inputs["input_ids"].shape[1])
    torch.testing.assert_close(again, out.logits[:, -3:], atol=1e-5, rtol=1e-5)
    assert int(cache.get_seq_length()) == length == inputs["input_ids"].shape[1]


def test_a_crop_of_a_static_cache_forgets_the_padding_of_a_turn() -> None:
    """Tokens that are written over it are seen, as on a dynamic cache."""
    if not hasattr(StaticLayer, "crop"):
        pytest.skip("static caches of this release cannot be cropped")
    family = FAMILIES["llava_onevision"]
    model, found = family.build(), []
    parts = [
        family.batch([[text(3), family.image(0), text(4)], [text(2), family.image(1), text(9, 2)]]),
        family.batch([[text(5, 3)], [text(2, 4)]]),
        family.batch([[text(1, 5)], [text(1, 6)]]),
    ]
    with tokencomp.patch(model, 0.6, reducer="kcenter", merge=True), torch.no_grad():
        for cache in (DynamicCache(), static_cache(model, 256)):
            mask = parts[0]["attention_mask"]
            model(**parts[0], past_key_values=cache, use_cache=True)
            for part in parts[1:]:
                whole = torch.cat([mask, part["attention_mask"]], 1)
                call = {"input_ids": part["input_ids"], "attention_mask": whole}
                out = model(**call, past_key_values=cache, use_cache=True)
                cache.crop(-part["input_ids"].shape[1])
            found.append(out.logits)
    assert oracle.difference(*found) < 1e-5


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("name", ["qwen2_vl", "gemma3"])
def test_a_crop_reaches_into_padding(name: str, merge: Any) -> None:
    """All text of the shorter sample leaves, and text that passes the window of Gemma 3 follows."""
    family = {**FAMILIES, **HYBRID}[name]
    image, more, new = family.image(0), text(9, 3), torch.tensor([text(14, 8), text(14, 9)])
    inputs = family.batch([[text(3), image, more], [text(4, 5)]])
    left = inputs["input_ids"].shape[1] - 6
    model, ones = with_window(family, left + 8), torch.ones_like(new)
    with tokencomp.patch(model, 0.5, reducer="kcenter", merge=merge) as handle, torch.no_grad():
        positions = family.positions(model, inputs)
        cache = oracle.cache_of(model(**inputs, position_ids=positions, use_cache=True))
        masks = [m[:1, :left] for m in oracle.kept_columns(handle, inputs, family.layers)]
        cache.crop(-6)
        turn = {
            "input_ids": new,
            "attention_mask": torch.cat([inputs["attention_mask"][:, :left], ones], 1),
            "position_ids": positions[..., left - 1 : left] + torch.arange(1, 15),
        }
        found = model(**turn, past_key_values=cache, use_cache=True).logits
    merged = None if not merge else oracle.Merged(handle)
    short = family.batch([[text(3), image, more[:-6]]])
    expected = oracle.masked_logits(model, family, short, masks, new[:1], merged)[:, left:]
    alone = model(new[1:], use_cache=False).logits  # of the shorter sample nothing is left
    assert (found - torch.cat([expected.float(), alone])).abs().max() < 5e-5


@pytest.mark.parametrize("reducer", ["uniform", "kcenter"])
def test_a_crop_removes_whole_tokens_of_an_image_whose_rest_is_merged(reducer: str) -> None:
    """It may end in the image where all tokens after it are kept and represent themselves alone."""
    family = FAMILIES["qwen2_vl"]
    model, inputs = family.build(), family.batch(rows(family, 1))
    with tokencomp.patch(model, 0.5, reducer=reducer, merge=True) as handle, torch.no_grad():
        cache = oracle.cache_of(model(**inputs, use_cache=True))
        masks, merged = oracle.kept_columns(handle, inputs, family.layers), oracle.Merged(handle)
    oracle.masked_logits(model, family, inputs, masks, merged=merged)
    kept, (span,) = masks[0][0], handle.stats.spans[0]
    columns, outcomes = kept.nonzero()[:, 0], set()
    for rows_left in range(int(kept[: span.start].sum()) + 1, len(columns)):
        end = columns[rows_left]
        whole = bool(kept[end:].all()) and bool((merged.sizes[0, end:] == 1).all())
        try:
            copy.deepcopy(cache).crop(rows_left - len(columns))
        except UnsupportedCacheError:
            assert not whole
        else:
            assert whole
        outcomes.add(whole)
    assert outcomes == {True, False}


def test_suspended_patches_are_gone_too() -> None:
    """A block whose own patch ends brings the first one back."""
    chat = Chat(FAMILIES["qwen2_vl"], 2, **SETTINGS["entry"])
    with tokencomp.patching.unpatched(chat.model):
        chat.refused(GONE)
        expected = chat.expected()
    torch.testing.assert_close(chat.say(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_flash_attention_on_static_caches(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would read rows that nothing has written; a patch that compresses nothing hides them."""
    backends.install(monkeypatch, backends.FLASH)
    family = FAMILIES[name]
    model = backends.build(family, backends.FLASH)
    try:
        chat = Chat(family, 1, model, static_cache(model, 256), ratio=0.6, reducer="uniform")
    except UnsupportedCacheError as refusal:
        pytest.skip(str(refusal))  # releases before 5.13, see test_backends.py
    chat.handle.set(ratio=0.0)
    found = chat.say(copy.deepcopy(chat.cache))
    chat.handle.remove()
    chat.refused(GONE)
    torch.testing.assert_close(found, chat.expected(), atol=1e-5, rtol=1e-5)
