"""Attention maps and hidden states of full length: a dropped key has weight 0."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
import transformers
from support import kinds, oracle, plans
from support.families import CORE, Family, text
from support.family.hybrid import HYBRID
from transformers import StaticCache
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import tokencomp
from benchmarks.conformance.run import compress, model_classes
from benchmarks.conformance.variants import variants
from tokencomp.conformance.build import tiny_model
from tokencomp.conformance.oracle import columns_left, hidden
from tokencomp.conformance.prompts import Prompts

FAMILY_NAMES = CORE


@pytest.mark.thin(3)
@pytest.mark.parametrize("name", plans.NAMES)
def test_maps_are_those_of_the_masked_run(family: Family, name: str) -> None:
    model = family.build("eager")
    inputs = family.batch(
        [[text(3), family.image(0), text(9, 3)], [family.image(1), text(5, 4)], [text(6)]]
    )
    where = family.positions(model, inputs)
    options = {"use_cache": False, "output_attentions": True, "output_hidden_states": True}
    with torch.no_grad(), tokencomp.patch(model, plan=plans.make(name, family.layers)) as handle:
        got = model(**inputs, position_ids=where, **options)
        masks = oracle.kept_columns(handle, inputs, family.layers)
    with torch.no_grad(), oracle.layer_masks(model, family, masks):
        full = model(**inputs, position_ids=where, **options)
    width = inputs["input_ids"].shape[1]
    assert len(got.attentions) == family.layers
    for layer, mask in enumerate(masks):
        here, there = got.attentions[layer], full.attentions[layer]
        assert here.shape == there.shape == (3, here.shape[1], width, width)
        for b in range(3):
            rows = mask[b]
            torch.testing.assert_close(here[b][:, rows], there[b][:, rows], atol=1e-5, rtol=1e-4)
            assert bool((here[b][:, rows][..., ~rows] == 0).all())
        hidden = got.hidden_states[layer + 1], full.hidden_states[layer + 1]
        torch.testing.assert_close(hidden[0][mask], hidden[1][mask], atol=1e-4, rtol=1e-4)
    assert torch.equal(got.attentions[-1], oracle.repeated_maps(got.attentions[-1], masks[-1]))


@pytest.mark.parametrize("merge", [False, True])
def test_maps_of_a_step_in_a_window(merge: Any) -> None:
    """Layers with a window have maps of what their cache holds without a patch."""
    family = HYBRID["gemma3"]
    model, inputs = family.build("eager"), family.batch([[text(3), family.image(0), text(4, 3)]])
    options = {"use_cache": True, "output_attentions": True}
    step = {"input_ids": torch.tensor([[7]])}

    with torch.no_grad():
        with tokencomp.patch(model, 0.5, reducer="kcenter", merge=merge) as handle:
            cache = oracle.cache_of(model(**inputs, use_cache=True))
            found = model(**step, past_key_values=cache, **options).attentions
            masks = oracle.kept_columns(handle, inputs, family.layers)
        with kinds.hidden_columns(family.decoder(model), masks):
            cache = oracle.cache_of(model(**inputs, use_cache=True))
        seen = [torch.cat([mask, torch.ones(1, 1).bool()], 1) for mask in masks]
        with kinds.hidden_columns(family.decoder(model), seen):
            hidden = model(**step, past_key_values=cache, **options).attentions
    for own, expected in zip(found, hidden, strict=True):
        assert own.shape == expected.shape
        if not merge:
            assert (own - expected).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["entry", "both"])
def test_maps_of_later_turns(family: Family, name: str) -> None:
    """A second prompt with an image, and single tokens after it, on a compressed cache."""
    model = family.build("eager")
    one, two = family.image(0), family.image(1)
    first = family.batch([[text(3), one, text(4, 3)]])
    whole = family.batch([[text(3), one, text(4, 3), two, text(5, 5)]])
    where, split = family.positions(model, whole), first["input_ids"].shape[1]
    turn = family.batch([[two, text(5, 5)]])
    turn["attention_mask"] = whole["attention_mask"]
    options = {"use_cache": True, "output_attentions": True}
    masks = []
    with torch.no_grad(), tokencomp.patch(model, plan=plans.make(name, family.layers)) as handle:
        out = model(**first, position_ids=where[..., :split], **options)
        masks.append(oracle.kept_columns(handle, first, family.layers))
        cache = oracle.cache_of(out)
        second = model(**turn, position_ids=where[..., split:], past_key_values=cache, **options)
        own = {"attention_mask": torch.ones_like(turn["input_ids"])}
        masks.append(oracle.kept_columns(handle, own, family.layers))
        step = {"input_ids": torch.tensor([[7]]), "position_ids": where[..., -1:] + 1}
        third = model(**step, past_key_values=cache, **options)
    seen = [torch.cat([a, b], 1) for a, b in zip(*masks, strict=True)]
    plain = {**whole, "position_ids": where}
    with torch.no_grad(), oracle.layer_masks(model, family, seen):
        full = model(**plain, use_cache=False, output_attentions=True).attentions
    width = whole["input_ids"].shape[1]
    for layer, mask in enumerate(seen):
        rows = mask[0, split:]
        expected = full[layer][0, :, split:][:, rows]
        torch.testing.assert_close(
            second.attentions[layer][0][:, rows], expected, atol=1e-5, rtol=1e-4
        )
        last = third.attentions[layer]
        assert last.shape[-2:] == (1, width + 1)
        hidden = torch.cat([~mask[0], torch.zeros(1, dtype=torch.bool)])
        assert bool((last[..., hidden] == 0).all()) and bool((last[..., ~hidden] > 0).all())


def test_maps_on_a_static_cache(family: Family) -> None:
    """Its unwritten rows are no columns of the prompt."""
    model = family.build("eager")
    inputs = family.batch([[text(3), family.image(0), text(9, 3)]])
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=100)
    with torch.no_grad(), tokencomp.patch(model, 0.5, reducer="uniform"):
        expected = model(**inputs, use_cache=True, output_attentions=True).attentions
        got = model(**inputs, past_key_values=cache, output_attentions=True).attentions
    for here, there in zip(got, expected, strict=True):
        torch.testing.assert_close(here, there, atol=1e-6, rtol=1e-5)


def test_the_last_hidden_state_carries_gradients(family: Family) -> None:
    """As without a patch, it is the tensor that the logits are made of."""
    model = family.build()
    inputs = family.batch([[text(3), family.image(0), text(9, 3)]])
    with tokencomp.patch(model, 0.5):
        out = model(**inputs, output_hidden_states=True)
        out.hidden_states[-1].retain_grad()
        out.logits[0, -1].sum().backward()
    assert out.hidden_states[-1].grad is not None
    assert out.hidden_states[-1].grad[0, -1].abs().max() > 0


@pytest.mark.parametrize("kind", ["gemma3n", "hy_v4_vl"])
def test_hidden_states_in_several_streams(kind: str) -> None:
    """Gemma 3n puts its streams in front of the batch, HY-V4 behind the rows."""
    if kind not in model_classes():
        pytest.skip(f"this release of transformers has no {kind}")
    model_class = getattr(transformers, model_classes()[kind])
    tiny = tiny_model(model_class, CONFIG_MAPPING[kind](), variants(kind)[0])
    prompts, layers, plan = Prompts(tiny), tiny.decoder.layers, plans.make("entry", 4)
    inputs, real = prompts.inputs(), prompts.inputs()["attention_mask"].bool()
    tiny.decoder.config.output_hidden_states = True
    with compress(tiny.whole, plan) as handle:
        got = decoder_states(tiny, prompts, inputs)
        (left, *_) = columns_left(handle.stats, plan, real, len(layers))
    with hidden(layers, [left] * len(layers)), contextlib.ExitStack() as stack:
        expected: list[torch.Tensor] = []
        for layer in layers:
            hook = layer.register_forward_hook(lambda m, args, out: expected.append(first(out)))
            stack.callback(hook.remove)
        tiny.decoder.config.output_hidden_states = False
        prompts.forward(inputs, use_cache=False)
    for here, there in zip(got[1:-1], expected[:-1], strict=True):
        assert here.shape == there.shape and here.ndim == 4
        for a, b in zip(rows_first(here, left), rows_first(there, left), strict=True):
            torch.testing.assert_close(a[left], b[left], atol=1e-4, rtol=1e-4)


def decoder_states(tiny: Any, prompts: Prompts, inputs: dict[str, Any]) -> list[torch.Tensor]:
    """The hidden states that the decoder of a tiny model returns."""
    seen: list[Any] = []
    hook = tiny.decoder.register_forward_hook(lambda m, args, out: seen.append(out.hidden_states))
    with hook:
        prompts.forward(inputs)
    return list(seen[0])


def first(out: Any) -> Any:
    return out[0] if isinstance(out, tuple) else out


def rows_first(x: torch.Tensor, columns: torch.Tensor) -> Any:
    """Streams of hidden states, each (B, L, d), whatever the order of their axes."""
    return x.unbind(2) if x.shape[:2] == columns.shape else x.unbind(0)
