"""Bodies, as AutoModel loads them, retrieval models, and calls of parts of a model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from support import oracle, plans
from support.families import CORE, FAMILIES, IMAGE, Family, text
from support.family.hybrid import HYBRID
from support.family.llava import LlavaOn
from support.prompts import hooks_of, prompt
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    ColPaliConfig,
    ColPaliForRetrieval,
    ColQwen2Config,
    ColQwen2ForRetrieval,
)

import tokencomp
from tokencomp.adapters.registry import adapter_for
from tokencomp.errors import (
    AlreadyCompressedError,
    NoDecoderError,
    NoVisualInputError,
    OptionError,
    UncompressedWarning,
    UnsupportedModelError,
)

FAMILY_NAMES = sorted(set(FAMILIES) - {"vila"})  # its one module generates


def test_states_of_a_body(family: Family) -> None:
    """Hidden states are those of the full-length body whose dropped columns are masked."""
    model, inputs = family.build(), prompt(family)
    body, plan = adapter_for(model).body, plans.make("both", family.layers)
    with torch.no_grad():
        with tokencomp.patch(body, 0) as handle:
            plain = body(**inputs)[0]  # some modules note things at their first call
            mask = inputs["attention_mask"]
            assert torch.equal(handle.stats.pooling_mask(mask), mask)
            assert handle.stats.ratio == 0 and not handle.stats
        clean = hooks_of(model)
        assert torch.equal(body(**inputs)[0], plain)
        with tokencomp.patch(body, plan=plan, strict=True) as handle:
            calls = [body(**inputs)[0], body.forward(**inputs)[0]]
            masks = oracle.kept_columns(handle, inputs, family.layers)
            mask = handle.stats.pooling_mask(inputs["attention_mask"])
            assert torch.equal(mask, masks[-1].to(mask))
            with pytest.raises(OptionError, match="last batch"):
                handle.stats.pooling_mask(mask[:1])
        positions = family.positions(model, inputs)
        with oracle.masked(model, family, masks):
            full = body(**inputs, position_ids=positions, use_cache=False)[0]
        assert torch.equal(body(**inputs)[0], plain)
    assert hooks_of(model) == clean
    assert torch.equal(*calls)
    assert (calls[0] - oracle.repeated(full, masks[-1])).abs().max() < 1e-5
    assert (plain - full)[masks[-1]].abs().max() > 1e-3


def colpali() -> tuple[nn.Module, dict[str, Tensor], Any]:
    """ColPali, whose inner body takes the pixels. Dropped columns before the first are zeros."""
    text_config = {
        **{"model_type": "gemma", "hidden_size": 64, "intermediate_size": 64, "vocab_size": 200},
        **{"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2},
        **{"head_dim": 16, "num_image_tokens": 16},
    }
    tower = {
        **{"model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 32},
        **{"num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 56, "patch_size": 14},
    }
    inner = {
        **{"model_type": "paligemma", "image_token_index": IMAGE, "text_config": text_config},
        **{"vision_config": tower, "projection_dim": 64, "hidden_size": 64},
    }
    model = ColPaliForRetrieval(ColPaliConfig(vlm_config=inner, embedding_dim=16)).eval()
    ids = torch.tensor([[*text(2), *[IMAGE] * 16, *text(5, 3)]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return model, {**inputs, "pixel_values": torch.randn(1, 3, 56, 56)}, None


def colqwen2() -> tuple[nn.Module, dict[str, Tensor], Any]:
    """ColQwen2, which puts the features into the embeddings itself; pages of two sizes.

    A position is the number of the column.
    """
    family = FAMILIES["qwen2_vl"]
    inner = family.config().to_dict()
    model = ColQwen2ForRetrieval(ColQwen2Config(vlm_config=inner, embedding_dim=16)).eval()
    rows = [[text(3), family.image(i), text(6, 3)] for i in (0, 1)]
    inputs = family.batch(rows)
    grids = inputs["image_grid_thw"]
    patches = inputs["pixel_values"].split(grids.prod(-1).tolist())
    inputs["pixel_values"] = pad_sequence(list(patches), batch_first=True)
    inputs.pop("mm_token_type_ids", None)
    width = inputs["input_ids"].shape[1]
    return model, inputs, torch.arange(width).expand(3, 2, -1)


@pytest.mark.parametrize("build", [colpali, colqwen2])
def test_page_vectors(build: Any) -> None:
    """Vectors of kept columns are those of the full-length model with masks."""
    torch.manual_seed(0)
    model, inputs, positions = build()
    decoder = adapter_for(model).decoder
    for p in decoder.parameters():
        if p.ndim == 2:
            p.data.mul_(5)
    family = type("Inner", (Family,), {"decoder": lambda self, model: decoder})()
    with torch.no_grad():
        plain, clean = model(**inputs).embeddings, hooks_of(model)
        with tokencomp.patch(model, 0.5, reducer="kcenter", strict=True) as handle:
            found = [model(**inputs).embeddings, model.forward(**inputs).embeddings]
            masks = oracle.kept_columns(handle, inputs, len(decoder.layers))
            assert handle.stats.ratio == pytest.approx(0.5, abs=0.05)
            with pytest.raises(NoVisualInputError):
                model(input_ids=inputs["input_ids"][:, :3])
        extra = {} if positions is None else {"position_ids": positions}
        if positions is None:  # PaliGemma's prefix sees in both directions
            seen = masks[0][:, None, None].expand(-1, 1, masks[0].shape[1], -1)
            hooks = [
                layer.register_forward_pre_hook(
                    lambda m, a, k: (a, {**k, "attention_mask": seen}), with_kwargs=True
                )
                for layer in decoder.layers
            ]
            full = model(**inputs).embeddings
            for hook in hooks:
                hook.remove()
        else:
            with oracle.masked(model, family, masks):
                full = model(**inputs, **extra).embeddings
        assert hooks_of(model) == clean
        real, left = inputs["attention_mask"].bool(), masks[-1]
        assert torch.equal(model(**inputs).embeddings[real], plain[real])
    assert torch.equal(found[0][real], found[1][real])
    assert (found[0] - full)[left].abs().max() < 1e-5
    assert (plain - full)[left].abs().max() > 1e-3


@pytest.mark.parametrize("name", ["qwen2_vl", "llava"])
def test_one_patch_per_decoder(name: str) -> None:
    """A body and the model around it share it; the second patch would count tokens twice."""
    model, inputs = FAMILIES[name].build(), prompt(FAMILIES[name])
    body = adapter_for(model).body
    for first, second in ((model, body), (body, model)):
        with tokencomp.patch(first, 0.5, reducer="uniform") as handle, torch.no_grad():
            with pytest.raises(AlreadyCompressedError, match="unpatch"):
                tokencomp.patch(second, 0.5)
            model(**inputs)
            assert handle.stats.ratio == pytest.approx(0.5, abs=0.05)
        tokencomp.patch(second, 0.5).remove()


def test_a_decoder_alone_is_refused() -> None:
    family = FAMILIES["qwen3_vl"]
    with pytest.raises(NoDecoderError, match="AutoModel"):
        tokencomp.patch(family.decoder(family.build()), 0.5)


# -- calls of parts --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*CORE, "vila", *sorted(HYBRID)])
def test_direct_calls_are_compressed(name: str) -> None:
    """`forward` of the model and of its body run like the modules, with the oracle's logits."""
    family = {**FAMILIES, **HYBRID}[name]
    model, inputs = family.build(), prompt(family)
    if name in HYBRID:
        inputs = family.batch([[text(3), family.image(0), text(6, 3)]])
    model(**inputs)
    body, clean = adapter_for(model).body, hooks_of(model)
    with tokencomp.patch(model, 0.5, reducer="uniform", strict=True) as handle, torch.no_grad():
        expected, states = model(**inputs).logits, body(**inputs)[0]
        masks = oracle.kept_columns(handle, inputs, family.layers)
        for call, wanted in ((model.forward, expected), (body.forward, states)):
            handle.set(ratio=0.5)  # forgets the counts
            out = call(**inputs)
            found = out.logits if call == model.forward else out[0]
            assert handle.stats.ratio > 0.3
            torch.testing.assert_close(found, wanted, atol=1e-6, rtol=0)
    assert hooks_of(model) == clean
    full, seen = oracle.masked_logits(model, family, inputs, masks), masks[-1]
    torch.testing.assert_close(expected[seen], full[seen], atol=5e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["qwen2_vl", "llava"])
def test_a_decoder_called_on_its_own_is_no_silent_door(name: str) -> None:
    """Features may be in its embeddings, at columns that nobody knows."""
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
    assert oracle.difference(found, expected) < 1e-5


@pytest.mark.skipif(not hasattr(transformers, "GraniteSWAConfig"), reason="a later release")
def test_rotary_modules_by_layer_are_refused() -> None:
    model = LlavaOn(transformers.GraniteSWAConfig, attn_implementation="eager").build("eager")
    with pytest.raises(UnsupportedModelError, match=r"rotary tables of rotary_embs\.0"):
        tokencomp.patch(model, 0.5)
