"""The decoder takes over the rotary tables of the entry stage, and they are what it would make."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from support import oracle, plans
from support.caches import ragged, single
from support.families import FAMILIES, text
from torch import Tensor

import tokencomp
from tokencomp.engine.stage import stage_scores

NAMES = ("qwen2_vl", "qwen3_vl", "llava_onevision", "internvl")


def parts(tables: Any) -> list[Tensor]:
    return list(tables) if isinstance(tables, tuple) else [tables]


class Tables:
    """What the decoder asks its rotary module for, and what layer 0 gets."""

    def __init__(self, decoder: Any) -> None:
        self.rotary = decoder.rotary_emb
        self.calls: list[tuple[Any, ...]] = []
        self.got: list[Any] = []
        self.rotary.register_forward_pre_hook(self._ask, with_kwargs=True)
        decoder.layers[0].register_forward_pre_hook(self._get, with_kwargs=True)

    def _ask(self, module: Any, args: Any, kwargs: Any) -> None:
        self.calls.append((*args, *kwargs.values()))

    def _get(self, module: Any, args: Any, kwargs: Any) -> None:
        self.got.append(kwargs["position_embeddings"])

    def computed(self) -> list[Tensor]:
        """What the class of the module computes for the last request."""
        return parts(type(self.rotary).forward(self.rotary, *self.calls[-1]))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("turns", [1, 2])
def test_tables_equal_those_of_the_decoder(name: str, turns: int) -> None:
    family = FAMILIES[name]
    model, prompt = family.build(), [text(3), family.image(0), text(9, 3)]
    inputs = family.batch([prompt] * 2 if turns == 1 else [prompt * 2])
    rotary = family.decoder(model).rotary_emb
    with tokencomp.patch(model, 0.5, reducer=plans.RELEVANT) as handle, torch.no_grad():
        tables = Tables(family.decoder(model))
        with mock.patch.object(type(rotary), "forward", wraps=type(rotary).forward) as forward:
            model(**inputs)
        assert forward.call_count == 1  # for the scores
        assert handle.stats and handle.stats.ratio > 0.4
        length = parts(tables.got[-1])[0].shape[-2]
        assert length < inputs["input_ids"].shape[1]
        for own, expected in zip(parts(tables.got[-1]), tables.computed(), strict=True):
            assert torch.equal(own.expand_as(expected), expected)
    assert "forward" not in vars(rotary)


@pytest.mark.parametrize(
    ("name", "compact"), [("qwen2_vl", False), ("llava_onevision", False), ("internvl", True)]
)
def test_logits_are_those_of_a_decoder_that_computes_them(name: str, compact: bool) -> None:
    """Also with padding, where compact positions need other tables, and in a decode step."""
    family = FAMILIES[name]
    model, positions = family.build(), "compact" if compact else "original"
    for inputs in (single(family), ragged(family)):
        outputs = []
        for shared in (True, False):
            with tokencomp.patch(model, 0.5, reducer=plans.RELEVANT, positions=positions):
                rotary = family.decoder(model).rotary_emb
                if not shared:
                    del vars(rotary)["forward"]
                with torch.no_grad():
                    out = model(**inputs, use_cache=True)
                outputs.append([out.logits, oracle.cache_of(out).layers[-1].keys])
        logits, keys = zip(*outputs, strict=True)
        real = inputs["attention_mask"].bool()
        assert torch.equal(logits[0][real], logits[1][real])
        assert keys[0].shape == keys[1].shape


def test_plans_without_scores_at_entry_replace_nothing() -> None:
    family = FAMILIES["qwen2_vl"]
    model = family.build()
    for reducer in ("uniform", "fastv"):
        with tokencomp.patch(model, 0.5, reducer=reducer):
            assert "forward" not in vars(family.decoder(model).rotary_emb)


@pytest.mark.parametrize(("media", "calls"), [("image", 0), ("video", 1)])
def test_the_default_scores_videos_alone(media: str, calls: int) -> None:
    family = FAMILIES["qwen2_vl"]
    model, inputs = family.build(), family.batch([[text(3), getattr(family, media)(), text(5, 9)]])
    scored = mock.patch.object(stage_scores, "input_scores", wraps=stage_scores.input_scores)
    with scored as scores, tokencomp.patch(model, 0.5) as handle, torch.no_grad():
        model(**inputs)
    assert scores.call_count == calls and handle.stats.ratio > 0.4
