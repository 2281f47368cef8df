"""Rotary modules get the original positions of kept tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from support import oracle
from support.families import EOS, FAMILIES, PAD, VOCAB, text
from support.family.llava import Llava

import tokencomp
from tokencomp.errors import UnsupportedModelError


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
