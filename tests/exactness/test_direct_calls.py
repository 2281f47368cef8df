"""Calls of `forward`, of the body and of the decoder: none of them runs around the hooks."""

from __future__ import annotations

import pytest
import torch
from support import oracle
from support.families import FAMILIES, Family, text
from support.family.hybrid import HYBRID
from support.hooks import hooks_of, prompt

import tokencomp
from tokencomp.adapters.registry import adapter_for
from tokencomp.errors import NoVisualInputError, UncompressedWarning

FAMILY_NAMES = sorted({**FAMILIES, **HYBRID})


def test_direct_calls_are_compressed(family: Family) -> None:
    """Of the model and of its body, with the logits of the masked full-length model."""
    model, inputs = family.build(), prompt(family)
    if family.name in HYBRID:
        inputs = family.batch([[text(3), family.image(0), text(6, 3)]])
    model(**inputs)
    body, clean = adapter_for(model).body, hooks_of(model)
    with tokencomp.patch(model, 0.5, reducer="uniform", strict=True) as handle, torch.no_grad():
        expected, states = model(**inputs).logits, body(**inputs)[0]
        masks = oracle.kept_columns(handle, inputs, family.layers)
        assert not all(bool(mask.equal(inputs["attention_mask"].bool())) for mask in masks)
        for call, wanted in ((model.forward, expected), (body.forward, states)):
            handle.set(ratio=0.5)  # forgets the counts
            out = call(**inputs)
            found = out.logits if call == model.forward else out[0]
            assert handle.stats.ratio > 0.3
            torch.testing.assert_close(found, wanted, atol=1e-6, rtol=0)
    assert hooks_of(model) == clean and "forward" not in vars(body)
    if family.name not in HYBRID:  # their oracle is in test_layer_types.py
        full = oracle.masked_logits(model, family, inputs, masks)
        seen = masks[-1]
        torch.testing.assert_close(expected[seen], full[seen], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["qwen3_vl", "internvl"])
def test_an_interrupt_leaves_no_door_open(name: str) -> None:
    """An interrupt from the keyboard skips the hooks that end a call."""
    family = FAMILIES[name]
    model, inputs = family.build(), prompt(family)
    body, decoder = adapter_for(model).body, family.decoder(model)

    def interrupt(module: torch.nn.Module, args: object) -> None:
        raise KeyboardInterrupt

    with tokencomp.patch(model, 0.5, reducer="uniform") as handle, torch.no_grad():
        expected = body(**inputs)[0]
        hook = decoder.layers[1].register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(**inputs)
        hook.remove()
        handle.set(ratio=0.5)
        assert torch.equal(body.forward(**inputs)[0], expected)
        assert handle.stats.ratio > 0.3


@pytest.mark.parametrize("name", ["qwen2_vl", "llava"])
def test_a_decoder_called_on_its_own_is_no_silent_door(name: str) -> None:
    """Features may stand in its embeddings, at columns that nobody knows."""
    family = FAMILIES[name]
    model = family.build()
    decoder, embeds = family.decoder(model), torch.randn(1, 9, 64)
    tokencomp.patch(model, 0.5, strict=True)
    with pytest.raises(NoVisualInputError, match="strict"):
        decoder(inputs_embeds=embeds)
    with tokencomp.patch(model, 0.5) as handle, torch.no_grad():
        with pytest.warns(UncompressedWarning, match="columns are unknown"):
            out = decoder(inputs_embeds=embeds, use_cache=True)
        with handle.disabled():
            assert torch.equal(decoder(inputs_embeds=embeds)[0], out[0])
