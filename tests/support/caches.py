"""Prompts, caches and a plan that the tests of caches, compiled decoding and chunks share."""

from __future__ import annotations

from typing import Any

import torch
from transformers import StaticCache

import tokencomp
from support.families import FAMILIES, Family, text

NAMES = ["internvl", "llava_onevision", "qwen2_vl", "qwen3_vl"]
ENTRY = tokencomp.Plan((tokencomp.Stage(0, 0.4, tokencomp.make_reducer("uniform")),))
LAYERS = tokencomp.Plan((tokencomp.Stage(3, 0.4, tokencomp.make_reducer("uniform")),))


def families(test: str) -> list[Family]:
    """Those of the four families whose installed release computes `test` rightly."""
    return [FAMILIES[name] for name in NAMES if not FAMILIES[name].defect(test)]


def ragged(family: Family) -> dict[str, torch.Tensor]:
    """A left-padded batch: one image, a video and an image, and text alone."""
    torch.manual_seed(7)
    return family.batch(
        [
            [text(3), family.image(0), text(9, 3)],
            [family.video(4), text(3, 4), family.image(1), text(5, 5)],
            [text(11, 6)],
        ]
    )


def single(family: Family, number: int = 0) -> dict[str, torch.Tensor]:
    """One prompt without padding; its image and length depend on `number`."""
    torch.manual_seed(7 + number)
    return family.batch([[text(3 + number), family.image(number % 2), text(9, 3)]])


def static_cache(model: Any, length: int) -> StaticCache:
    """A static cache of `length` rows, with the arguments of the installed release."""
    config = model.config.get_text_config(decoder=True)
    return StaticCache(config=config, max_cache_len=length)
