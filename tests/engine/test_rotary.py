"""The decoder takes over the rotary tables of the entry stage, and they are what it would make."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
import transformers
from support import oracle, plans
from support.caches import ragged, single
from support.families import EOS, FAMILIES, PAD, VOCAB, text
from support.family.llava import Llava
from torch import Tensor

import tokencomp
from tokencomp.engine.stage import stage_scores
from tokencomp.errors import UnsupportedModelError

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


def test_every_rotary_module_gets_the_original_positions() -> None:
    """As in Molmo 2, of which some layers take tables of a second module."""
    family = FAMILIES["llava"]
    model = family.build()
    decoder: Any = family.decoder(model)
    decoder.rotary_emb_second = type(decoder.rotary_emb)(decoder.config)
    decoder.rotary_emb_second.inv_freq *= 0.5

    def before_decoder(module: Any, args: Any, kwargs: Any) -> None:
        decoder.positions = kwargs["position_ids"]

    def before_layer(module: Any, args: Any, kwargs: Any) -> Any:
        tables = decoder.rotary_emb_second(args[0], position_ids=decoder.positions)
        return args, {**kwargs, "position_embeddings": tables}

    inputs = family.batch([[text(3), family.image(0), text(9, 3)], [text(5)]])
    with tokencomp.patch(model, 0.5, reducer="uniform") as handle, torch.no_grad():
        decoder.register_forward_pre_hook(before_decoder, with_kwargs=True)
        decoder.layers[1].register_forward_pre_hook(before_layer, with_kwargs=True)
        found = model(**inputs).logits[:, -1]
        masks = oracle.kept_columns(handle, inputs, family.layers)
    expected = oracle.masked_logits(model, family, inputs, masks)[:, -1]
    assert (found - expected).abs().max() < 1e-5


class LlavaGranite(Llava):
    """A verified type around a text decoder with a rotary module for every base."""

    def config(self) -> Any:
        config = super().config()
        config.text_config = transformers.GraniteSWAConfig(
            vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=4,
            num_attention_heads=4, num_key_value_heads=2, bos_token_id=1, eos_token_id=EOS,
            pad_token_id=PAD, attn_implementation="eager",
        )  # fmt: skip
        return config


@pytest.mark.skipif(not hasattr(transformers, "GraniteSWAConfig"), reason="a later release")
def test_rotary_modules_by_layer_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"rotary tables of rotary_embs\.0"):
        tokencomp.patch(LlavaGranite().build("eager"), 0.5)
