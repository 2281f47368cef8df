"""Prompts that exceed an extended visual window are refused, in every kind of patch and turn."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.families import FAMILIES, IMAGE, VIDEO, Family, text
from transformers import DynamicCache

import tokencomp
from tokencomp.errors import SpanError

PATCHES: dict[str, dict[str, Any]] = {
    "unpatched": {},
    "off": {"ratio": 0.0, "reducer": "pool"},
    "patched": {"ratio": 0.5, "reducer": "uniform"},
    "between layers": {"ratio": 0.5, "reducer": "fastv"},
    "disabled": {"ratio": 0.5, "reducer": "uniform"},
}


@contextlib.contextmanager
def extended(model: Any, kind: str, target: int) -> Iterator[None]:
    """Extend the window to `target` tokens, with one of `PATCHES`."""
    with contextlib.ExitStack() as stack:
        if kind == "unpatched":
            stack.enter_context(tokencomp.extend_visual_context(model, target))
        else:
            patch = tokencomp.patch(model, **PATCHES[kind], extend_context=target)
            handle = stack.enter_context(patch)
            if kind == "disabled":
                stack.enter_context(handle.disabled())
        yield


@pytest.mark.parametrize("kind", PATCHES)
def test_too_many_tokens_in_one_call(family: Family, kind: str) -> None:
    model, media = family.build(), family.video(4)
    inputs = family.batch([[text(3), media, text(4, 2)], [text(40)]])
    visual = sum(token in (IMAGE, VIDEO) for token in media.ids)
    with torch.no_grad():
        with (
            extended(model, kind, visual - 1),
            pytest.raises(SpanError, match=f"sample 0 has .* extended to {visual - 1}"),
        ):
            model(**inputs)
        with extended(model, kind, len(media.ids)):
            model(**inputs)


@pytest.mark.parametrize("kind", PATCHES)
@pytest.mark.parametrize("with_cache", [True, False])
def test_earlier_turns_count(kind: str, with_cache: bool) -> None:
    """Visual tokens in a cache count, also in its copies and in the user's cache; text does not."""
    family = FAMILIES["llava"]
    model, media = family.build(), family.image()
    visual = media.ids.count(IMAGE)
    turn = family.batch([[text(30), media, text(4, 2)]])
    width = turn["input_ids"].shape[1]
    cache = DynamicCache() if with_cache else None
    with torch.no_grad(), extended(model, kind, 2 * visual):
        for turns in (1, 2, 3):
            turn["attention_mask"] = torch.ones(1, turns * width).long()
            call = {**turn, "past_key_values": copy.deepcopy(cache), "use_cache": True}
            if turns < 3:
                cache = model(**call).past_key_values
                continue
            with pytest.raises(SpanError, match=f"has {visual} .*, after {2 * visual} in the"):
                model(**call)


def test_all_rows_of_an_older_cache_count() -> None:
    """Rows from before the extension may all be visual, so all of them count."""
    family = FAMILIES["llava"]
    model, image = family.build(), family.batch([[family.image(), text(4)]])
    tokens = image["input_ids"].shape[1]
    with torch.no_grad():
        cache = model(input_ids=torch.tensor([text(9)]), use_cache=True).past_key_values
        image["attention_mask"] = torch.ones(1, tokens + 9).long()
        with (
            tokencomp.extend_visual_context(model, tokens),
            pytest.raises(SpanError, match="after 9 in the cache"),
        ):
            model(**image, past_key_values=cache)
